"""TorchEngine: DTensor, FSDP2 and whole weights behind the Engine protocol.

It is composed of parts, each chosen once:

    Weights         how each group of weights is held: whole beside sharded masters, or fully sharded (`strategy.py`)
    StepStrategy    how a step runs: micro-batches one after another, or through a pipeline (`step.py`)
    Update          the optimizer (`update.py`)
    observers       callbacks on the gradients of a step (`observers.py`)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...data.assignment import Share
from ...data.batch import MicroBatch
from ...models.mixture.mixture import experts_of
from ...models.protocol import Model, decoder_shape, may_skip_weights
from ...optim.optimizers.parameters import NamedParameter, initial_counter_values
from ..collective_waits import measure_collectives
from ..config import ParallelConfig
from ..context.split import ContextParallel
from ..engine import EngineSettings, OptimizerFactory, StepLoss
from ..experts.balance import ExpertBalance
from ..fragment import Fragment
from ..gradient_noise import GradientNoise, Measure, Moments
from ..heartbeat import Phase
from ..hybrid.attention import HybridAttention
from ..mesh import Mesh
from ..observers import GradientObserver, optimizer_observers
from ..on_host import RowOffload
from ..optimizer_state import optimizer_fragments
from ..pipeline.run import Pipeline
from ..pipeline.shared_cell import SharedCell, own_parameters
from ..pipeline.stages import StagePlan, stage_count
from ..pipeline.tied_head import TiedHead
from .assembly import agree_on_symmetric_products, fill_weights, fuses_experts, fuses_swiglu, own_stages, parallelize_stage
from .groups import parameter_groups
from .inputs import ModelInputs
from .islands import Islands, layers_of_weights
from .step import Accumulation, PipelinedStep, SharedWeights, StepStrategy
from .update import Update
from .weights import Weights, make_strategies


class TorchEngine:
    """See the module's docstring; methods are documented in `engine.Engine`."""

    def __init__(
        self, model: Model, mesh: Mesh, make_optimizer: OptimizerFactory, parallel: ParallelConfig, settings: EngineSettings
    ) -> None:
        """model: on the meta device; it is sharded, allocated and initialised here."""
        self.mesh = mesh
        model.to(settings.storage)
        layers = layers_of_weights(model) if settings.local.active else {}
        plan = settings.stages or StagePlan.single(len(model.block_modules()))
        assert plan.count == stage_count(parallel), f"{plan.count} stages are no division for parallel.pp={parallel.pp}"
        stages = own_stages(model, plan, mesh.coordinates["pp"])
        ring: dict[str, Any] = {"ring_direct": parallel.ring_direct, "ring_exchange": parallel.ring_exchange}
        context = ContextParallel(mesh, parallel.cp_kind, **ring) if mesh.layout.cp > 1 else None
        attention = HybridAttention(mesh, **ring) if parallel.hdp != "none" else context
        groups = parameter_groups(parallel, mesh.layout, experts_of(model))
        strategies = make_strategies(groups, mesh, parallel, settings, may_skip=may_skip_weights(model))
        self.weights = Weights(strategies, mesh, settings.compute, parallel.gradient_exchange)
        fused = fuses_swiglu(model, mesh, parallel, settings), fuses_experts(model, mesh, parallel, settings)
        offload: RowOffload | None = None
        if settings.hidden_copies is not None:
            offload = RowOffload(settings.hidden_copies, model.block_modules(), mesh.device)
        how = {"fuse_swiglu": fused[0], "fuse_experts": fused[1]}
        for stage in stages.values():
            parallelize_stage(stage, mesh, attention, parallel, settings, **how, offload=offload)
            self.weights.shard(stage)
        held = list(stages.values())
        self.module: nn.Module = held[0] if len(held) == 1 else nn.ModuleList(held)
        if mesh.layout.tp * mesh.layout.cp * mesh.layout.ep > 1:
            mesh.before_closing.append(measure_collectives(mesh.device, mesh.compute_time.collective_waiting))
        shape = model.decoder_config
        named = own_parameters(stages, shape, plan)
        mixes = shape is not None and shape.mixture_layers()
        self._balance = ExpertBalance(shape, held, mesh, settings.balance) if shape is not None and mixes else None
        slices = parallel.sequence_parallel
        inputs = ModelInputs(mesh, context, model, self._balance, sequence_parallel=slices, compiled=settings.compile)
        self._step: StepStrategy
        if plan.count > 1:
            decoder = decoder_shape(model)
            shared: list[SharedWeights] = [TiedHead.of(mesh, plan, named)] if decoder.tied else []
            if decoder.experts.carried_dim:
                shared.append(SharedCell(mesh, plan, decoder, stages))
            pipeline = Pipeline(stages, plan, parallel, mesh, settings.compute)
            self._step = PipelinedStep(pipeline, inputs, shared)
        else:
            self._step = Accumulation(self.module, inputs, self.weights, mesh, offload)
        self.weights.adopt(held, named)
        fill_weights(self.weights.local, model, settings.seed, mesh.device)

        self._parameters = self.weights.named_parameters(model)
        self.optimizer = make_optimizer(self._parameters, self.weights.shards)
        agree_on_symmetric_products(self.optimizer, mesh, settings)
        self._update = Update(self.optimizer, self.weights.local)
        self._noise = GradientNoise(mesh, self.weights.placed)
        if settings.measures:
            self.weights.watch(self._noise.watch)
        self._observers: list[GradientObserver] = [self._noise, *optimizer_observers(self.optimizer)]
        self.islands: Islands | None = None
        if settings.local.active:
            self.islands = Islands.of(settings.local, mesh, self.weights, layers)

    def accumulate(self, share: Share, global_tokens: torch.Tensor, measure: Measure = Measure.NOTHING) -> StepLoss:
        """Run forward and backward of this rank's share."""
        micro_batches = share.micro_batches
        assert micro_batches, "a rank without a micro-batch would leave its peers waiting in a collective"
        self._noise.measure = measure
        begun = [observer.begin(share, global_tokens) for observer in self._observers]
        pauses = [number for number in begun if number is not None]
        self.weights.begin_step(single=share.passes == 1, fused=self._update.fused)
        run = functools.partial(self._step.accumulate, micro_batches, global_tokens, pauses, self._show_part)
        extras: dict[str, torch.Tensor] = {}
        with self.mesh.compute_time:
            if self._balance is None:
                total = run()
            else:
                total, extras = self._balance.run_step(global_tokens, lambda: self._count_routed(micro_batches), run)
        self.mesh.heartbeat.beat(Phase.EXCHANGE)
        self.weights.wait_reduce()
        for observer in self._observers:
            observer.see_whole(self.weights.gradients())
        own = total.clone()  # sums are taken in place
        return StepLoss(self._sum_over_batch(total), global_tokens, extras, own)

    @torch.no_grad()
    def _count_routed(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Run the forward passes of a step, for what its mixtures count."""
        self._step.evaluate(micro_batches)
        self.weights.reshard()

    def _show_part(self) -> None:
        for observer in self._observers:
            observer.see_part(self.weights.gradients())

    def _sum_over_batch(self, total: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that hold different parts of the global batch; every stage's ranks get the result."""
        return self.mesh.sum(self.mesh.sum(total, "data"), "pp")

    @torch.no_grad()
    def gradient_norm(self) -> torch.Tensor:
        """Compute the norm of the whole gradient, in one collective with the gradient statistics."""
        return self._noise.norm(self.weights.norm_square())

    @torch.no_grad()
    def clip(self, max_norm: float, norm: torch.Tensor) -> None:
        """Scale by min(1, max_norm / (norm + 1e-6)), PyTorch's convention, without reading the norm on the host."""
        gradients = self.weights.gradients()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self._update.scale(gradients, factor.to(self._parameters[0].tensor))

    @torch.no_grad()
    def gradient_moments(self, samples: int) -> Moments | None:
        """Return what `gradient_norm` summed and, where asked for, the projections on the whole gradient."""
        return self._noise.moments(samples, [functools.partial(self._whole_gradient, p) for p in self._parameters])

    def _whole_gradient(self, parameter: NamedParameter) -> torch.Tensor:
        assert parameter.tensor.grad is not None
        return self.weights.shards.gather(parameter, parameter.tensor.grad.to(parameter.tensor.dtype))

    @property
    def masks_updates(self) -> bool:
        """See `engine.Engine`."""
        return self._update.masked

    def update(self, lr: float, skip: torch.Tensor | None = None) -> None:
        """Take one optimizer step, and let the balance of experts learn from the step."""
        if self._balance is not None:
            self._balance.learn(skip)
        self.weights.wait_all_gather(compute_copies=self._update.fused or self._update.rounded)
        kept = self.weights.begin_update(rounded=self._update.rounded)
        self._update.step(lr, skip, kept)
        self.weights.all_gather_weights(copied=self._update.fused)

    def forget_updates(self, count: int) -> None:
        """See `engine.Engine`."""
        self._update.forget(count)

    def zero_grad(self) -> None:
        """Discard the gradient, and what the balance of experts has counted."""
        if self._balance is not None:
            self._balance.forget()
        self._update.zero_grad()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> StepLoss:
        """Compute the loss without gradients, over all ranks."""
        tokens = torch.tensor(sum(batch.valid_tokens for batch in micro_batches), dtype=torch.float64, device=self.mesh.device)
        with self._evaluated_weights():
            self.weights.sync_from_masters()
            run = functools.partial(self._step.evaluate, micro_batches)
            total = run() if self._balance is None else self._balance.run_evaluation(tokens, run)
            self.weights.reshard()
        # Context-parallel ranks have each counted the tokens of whole samples.
        return StepLoss(self._sum_over_batch(total), self.mesh.sum(tokens, "data") / self.mesh.layout.cp, {})

    @contextlib.contextmanager
    def _evaluated_weights(self) -> Generator[None]:
        """Hold the weights that are evaluated, where the optimizer trains at others."""
        averages = self._update.averages
        if self.islands is not None:
            with self.islands.outer_weights():
                yield
            return
        if averages is None:
            yield
            return
        self.weights.wait_all_gather(compute_copies=False)
        averages.hold_averages()
        self.weights.masters_written()
        try:
            yield
        finally:
            self.weights.wait_all_gather(compute_copies=False)
            averages.hold_training_weights()
            self.weights.masters_written()

    def assignments(self) -> torch.Tensor | None:
        """See `engine.Engine`."""
        return None if self._balance is None else self._balance.assignments

    def forget_assignments(self) -> None:
        """See `engine.Engine`."""
        if self._balance is not None:
            self._balance.assignments = None

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's boxes of weights and of the optimizer's arrays."""
        self.weights.wait_all_gather(compute_copies=False)
        yield from self.weights.fragments()
        held = optimizer_fragments(self.optimizer, self._parameters)
        yield from held if self.islands is None else self.islands.fragments(held)
        if self._balance is not None:
            yield from self._balance.fragments()

    def prepare_restore(self) -> None:
        """Make the optimizer create its state: one update with a zero gradient at rate zero, which changes no weight.

        It takes no more memory than one of training.
        """
        self.weights.sync_from_masters()  # those of the initial values end here if they exist only during an update
        for weight in self.weights.local.values():
            like = weight.compute_copy if self._update.fused else None
            weight.tensor.grad = torch.zeros_like(weight.tensor, dtype=None if like is None else like.dtype)
        self.update(0.0)
        self.zero_grad()
        self.load_counters(initial_counter_values(self.optimizer, self.counters()))
        if self.islands is not None:
            self.islands.prepare_restore()

    def counters(self) -> dict[str, float]:
        """Return the scalar state of the optimizer and of the weights."""
        return self._update.counters() | self.weights.counters()

    def load_counters(self, counters: dict[str, float]) -> None:
        """Set the scalar state, after fragments have been restored."""
        own = self.weights.counters().keys()
        self.weights.load_counters(counters)
        self._update.load_counters({name: value for name, value in counters.items() if name not in own})
        if self._update.averages is not None:
            self._update.averages.hold_training_weights()
        if self.islands is not None:
            self.islands.restored()
        self.weights.masters_written()

    def finish(self) -> None:
        """Wait for pending all-gathers: one that ends while the interpreter exits would crash the process."""
        if self.islands is not None:
            self.islands.finish()
        self.weights.wait_all_gather(compute_copies=True)
