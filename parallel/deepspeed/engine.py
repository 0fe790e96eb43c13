"""DeepSpeedEngine: ZeRO 0–3 with CPU and NVMe offload behind the Engine protocol.

DeepSpeed shards, reduces, offloads and updates. This class makes a run under it equal to the run under TorchEngine:

- The loss of a micro-batch is divided by the tokens of the whole global batch (rule R2) and multiplied by the number of
  ranks, because DeepSpeed averages gradients over them.
- Each step sets which micro-batch is its last, so their number may change between steps.
- Initial weights are drawn into the fp32 masters, box by box (rule R3); DeepSpeed would round them to bf16 first.
- Norm, clipping and learning rate are set here, between the last reduction and DeepSpeed's update.

An optimizer gets flat pieces of parameters, so its update must be elementwise; `updates_elementwise` tests that.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...data.assignment import Share
from ...data.batch import MicroBatch
from ...kernels.attention import CausalAttention
from ...models.init import fill
from ...models.protocol import BlockKernels, Model, may_skip_weights
from ...optim.optimizers.parameters import NamedParameter
from ..activation import apply_policies
from ..config import ParallelConfig
from ..engine import EngineSettings, OptimizerFactory, StepLoss
from ..fragment import Fragment
from ..gradient_noise import GradientNoise, Measure, Moments
from ..heartbeat import Phase
from ..mesh import Mesh
from ..shards import Placed
from ..weight_use import SameWeights
from .config import QUANTISED, derive, lossy_features
from .optimizer import FlatPieces, cpu_adam, require_op
from .setup import check_quantisable, import_deepspeed, materialise, quiet, swap_folder
from .state import whole_shape
from .state_by_stage import state_of

log = logging.getLogger(__name__)


class DeepSpeedEngine:
    """See the module's docstring; methods are documented in `engine.Engine`."""

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        make_optimizer: OptimizerFactory,
        parallel: ParallelConfig,
        settings: EngineSettings,
    ) -> None:
        """model: on the meta device. parallel: without problems (`deepspeed.config.deepspeed_problems`)."""
        deepspeed = import_deepspeed(mesh.device.type)
        for exception in lossy_features(parallel) if mesh.is_main else ():
            log.warning("parallel.deepspeed.config.%s: losses depend on the number of processes and on resuming", exception)
        self.module: nn.Module = model
        may_skip = may_skip_weights(model)
        self.mesh = mesh
        self.islands = None
        self._compiled = settings.compile
        self._ranks = mesh.layout.world_size
        os.environ.setdefault("LOCAL_RANK", "0")
        if "nvme" in (parallel.offload, parallel.offload_weights):
            assert parallel.offload_path is not None
            require_op("AsyncIOBuilder", "parallel.offload", "use parallel.offload=cpu")
            parallel = replace(parallel, offload_path=swap_folder(parallel.offload_path, mesh.rank))
        derived = derive(parallel, settings.precision, pin_memory=mesh.device.type == "cuda")
        quantised = bool(derived["zero_optimization"].get("zero_quantized_weights"))
        if quantised:
            require_op("QuantizerBuilder", QUANTISED, "leave it out")
        blocks = model.block_modules()
        shape = model.decoder_config
        model.use_kernels({layer: BlockKernels(CausalAttention(settings.kernel(shape, layer))) for layer in blocks})
        for layer, block in blocks.items():
            policy = settings.policy(layer)
            # Leave ZeRO-3's hooks around a block out of the compiled code: they gather its weights.
            hooked = settings.compile and parallel.zero == 3 and policy != "offload"
            apply_policies([block], [policy], compiled=settings.compile and not hooked)
            if hooked:
                block.forward = torch.compile(block.forward)
        materialise(model, mesh.device, settings.compute, derived if parallel.zero == 3 else None)
        parameters = [
            NamedParameter(name, parameter, whole_shape(parameter), model.decays(name), model.lr_scale(name))
            for name, parameter in model.named_parameters()
        ]
        if parallel.zero == 3 and blocks:
            # Gather a block's weights together, before the block. A gather inside it would break the compiled graph and
            # selective recomputation.
            deepspeed.utils.set_z3_leaf_modules(model, [type(block) for block in blocks.values()])
        self.optimizer = make_optimizer(parameters, FlatPieces())
        if parallel.deepspeed.cpu_adam:
            self.optimizer = cpu_adam(self.optimizer)
        with quiet():
            self._engine: Any = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=derived, dist_init_required=False
            )[0]
        # Hooks on its own weights hold it for ever otherwise, and a stage or a rewind builds another engine beside it.
        mesh.before_closing.append(self._engine.destroy)
        if quantised:
            check_quantisable(model, self._ranks)
        self._state = state_of(self._engine, self.optimizer, parallel.zero)
        self._pending = False  # whether a gradient waits for an update
        for fragment in self._state.fragments():
            if fragment.role != "weight":  # of an optimizer that has its state from the beginning
                continue
            fill(
                fragment.tensor,
                model.initial(fragment.name),
                seed=settings.seed,
                name=fragment.name,
                global_shape=fragment.global_shape,
                offsets=fragment.box.offsets,
                on=mesh.device,
            )
        self._state.sync_from_masters()
        named = dict(model.named_parameters())
        self._same: SameWeights | None = None
        if may_skip and parallel.zero > 0 and self._ranks > 1:
            # ZeRO-2 and 3 send a weight's gradient as soon as it is there, ZeRO-1 all in one order.
            units = [[name] for name in named] if parallel.zero > 1 else [list(named)]
            self._same = SameWeights(units, [mesh.group("data")], mesh.compute_time.waiting)
            for name, weight in named.items():
                self._same.see(name, weight)
        # Hooks see the gradient times the number of ranks; DeepSpeed's mean divides by it later.
        self._noise = GradientNoise(mesh, {name: Placed.of(weight, mesh) for name, weight in named.items()}, self._ranks)
        for name, weight in named.items() if settings.measures else ():
            self._noise.watch(name, weight)

    def _forward(self, micro_batch: MicroBatch) -> torch.Tensor:
        micro_batch = micro_batch.to(self.mesh.device)
        if self._compiled and micro_batch.documents is not None:
            micro_batch.documents.mark_dynamic()
        return self._engine(micro_batch.tokens_BS, micro_batch.targets_BS, micro_batch.documents)

    def accumulate(self, share: Share, global_tokens: torch.Tensor, measure: Measure = Measure.NOTHING) -> StepLoss:
        """Run forward and backward of this rank's share."""
        micro_batches = share.micro_batches
        assert micro_batches, "a rank without a micro-batch would leave its peers waiting in a collective"
        self._noise.measure = measure
        self._noise.begin(share, global_tokens)
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        self._pending = True
        with self.mesh.compute_time:
            for index, micro_batch in enumerate(micro_batches):
                self._engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
                self.mesh.heartbeat.beat(Phase.FORWARD, index + 1)
                loss = self._forward(micro_batch)
                if self._same is not None:
                    self._same.check(loss)
                self.mesh.heartbeat.beat(Phase.BACKWARD, index + 1)
                self._engine.backward(loss * (self._ranks / global_tokens), scale_wrt_gas=False)
                total += loss.detach()
        self.mesh.heartbeat.beat(Phase.EXCHANGE)
        own = total.clone()  # sums are taken in place
        return StepLoss(self.mesh.sum(total, "data"), global_tokens, {}, own)

    @torch.no_grad()
    def gradient_norm(self) -> torch.Tensor:
        """Compute the norm from this rank's pieces of the reduced gradient. A replicated one counts as 1/ranks."""
        squares = self._state.gradient_squares().to(self.mesh.device)
        if self._state.replicated:
            squares = squares / self._ranks
        return self._noise.norm(squares)

    @torch.no_grad()
    def clip(self, max_norm: float, norm: torch.Tensor) -> None:
        """Scale by min(1, max_norm / (norm + 1e-6))."""
        self._state.clip_gradients(max_norm, norm)

    @torch.no_grad()
    def gradient_moments(self, samples: int) -> Moments | None:
        """Return what `gradient_norm` summed; no projections."""
        return self._noise.moments(samples)

    @property
    def masks_updates(self) -> bool:
        """False: DeepSpeed's update can't be skipped on the device."""
        return False

    def forget_updates(self, count: int) -> None:
        """Do nothing: an update that was skipped was never begun."""

    def update(self, lr: float, skip: torch.Tensor | None = None) -> None:
        """Take one optimizer step, unless the device says to skip it, for which the host waits."""
        if skip is not None and skip.item():
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._engine.step()
        self._state.updated()
        self._pending = False

    def zero_grad(self) -> None:
        """Discard the gradient. DeepSpeed's update already does so."""
        if self._pending:
            self._state.discard_gradients()
            self._pending = False

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> StepLoss:
        """Compute the loss without gradients, over all ranks."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            self.mesh.heartbeat.beat(Phase.EVALUATION, number)
            sums[0] += self._forward(micro_batch)
            sums[1] += micro_batch.valid_tokens
        self.mesh.sum(sums, "data")
        return StepLoss(sums[0], sums[1], {})

    def assignments(self) -> torch.Tensor | None:
        """Return None: models with experts are refused."""
        return None

    def forget_assignments(self) -> None:
        """Do nothing: there are none."""

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's boxes of the fp32 masters and of the optimizer's tensors that have a weight's shape."""
        return self._state.fragments()

    def prepare_restore(self) -> None:
        """Make the optimizer create its state: one update with a zero gradient at rate zero, which changes no weight."""
        self._state.create_optimizer_state()

    def counters(self) -> dict[str, float]:
        """Return the scalar optimizer state, which is the same for every parameter."""
        return self._state.counters()

    @torch.no_grad()
    def load_counters(self, counters: dict[str, float]) -> None:
        """Set the scalar state, and update the compute weights from the restored masters."""
        self._state.load_counters(counters)
        self._state.sync_from_masters()

    def finish(self) -> None:
        """Do nothing: no communication is pending between steps."""
