"""TorchEngine: FSDP2 and DTensor behind the Engine protocol.

All ZeRO stages are one mechanism, FSDP2, told when to communicate (counts per step with M micro-batches, per group):

    stage  weights gathered        gradient reduced      mesh of a weight
    0      never (M local copies)  all-reduced once      (copies, 1)
    1      once                    once                  (shards)
    2      once                    M times               (shards)
    3      2 M times               M times               (shards)

A single data-parallel rank has nothing to gather or reduce: there no stage shards anything (`unsharded.py`).

Gradients are *summed* over ranks, because each micro-batch's loss is already divided by the tokens of the whole global
batch (rule R2): no factor depends on how the batch was cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ..config.parallel import ParallelConfig
from ..data.batch import MicroBatch
from ..models.attention import positions
from ..models.init import fill
from ..models.llama import Llama
from ..optim.agvm import AGVM
from ..optim.parameters import NamedParameter, OnePass, Shards
from ..optim.statistics import GradientStatistics
from .activation import apply_policies
from .context.split import ContextParallel
from .cost import balanced_stages
from .engine import StepLoss
from .float8 import use_float8
from .fragment import Fragment
from .memory import block_policies
from .mesh import Mesh
from .moments import GradientMoments, Measure
from .pipeline.run import Pipeline, StageInputs, TiedHead
from .pipeline.stages import carve
from .shards import MeshShards, Placed, local, own_part
from .tensor.placements import apply_tensor_parallelism, stream_dim
from .unsharded import MasterWeights, materialize

OptimizerFactory = Callable[[Sequence[NamedParameter], Shards], torch.optim.Optimizer]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class TorchEngine:
    """See the module's docstring; methods are documented in `engine.Engine`."""

    def __init__(
        self,
        model: Llama,
        mesh: Mesh,
        make_optimizer: OptimizerFactory,
        *,
        seed: int,
        parallel: ParallelConfig,
        precision: str = "bf16",
        activation: str = "none",
        activation_budget: float | None = None,
        compile_blocks: bool = False,
        float8: str = "none",
        seq_len: int = 0,
        measures: bool = False,
    ) -> None:
        """model: on the meta device; it is sharded, given storage and its initial weights here (rule R3).

        seq_len: positions per sample, for the balance of pipeline stages; 0: attention's cost is left out of it.
        measures: whether steps may be asked for gradient statistics.
        """
        self.mesh = mesh
        self._zero = mesh.layout.zero
        self._parallel = parallel
        self._width = model.dim
        # Where shards, gradients and optimizer state live: with CPU offload, FSDP2 copies to and from it.
        self._home = torch.device("cpu") if parallel.offload == "cpu" else mesh.device
        self._slices_sequences = mesh.layout.tp > 1 and parallel.sequence_parallel
        self._sharded = mesh.layout.world_size > mesh.layout.tp or parallel.offload == "cpu"
        compute = PRECISIONS[precision]
        model.to(torch.float64 if compute == torch.float64 else torch.float32)
        plan = balanced_stages(model, parallel, seq_len, activation)
        self._stages = {
            index: carve(model, plan.layers[index], first=index == 0, last=index == plan.count - 1)
            for index in plan.held_by(mesh.coordinates["pp"])
        }
        stages = list(self._stages.values())
        policies = block_policies(model, parallel, precision, activation, activation_budget, compiled=compile_blocks)
        self.module: nn.Module = stages[0] if len(stages) == 1 else nn.ModuleList(stages)
        self._groups: list[FSDPModule] = []
        self._context = ContextParallel(mesh, parallel.cp_kind) if mesh.layout.cp > 1 else None
        for stage in stages:
            if self._context is not None:
                self._context.apply(stage)
            if float8 != "none":
                use_float8(stage.layers.values(), float8, mesh.device)
            if mesh.layout.tp > 1:
                apply_tensor_parallelism(stage, mesh.axes["tp"], parallel.sequence_parallel)
            blocks = list(stage.layers.values())
            apply_policies(blocks, [policies[int(name)] for name in stage.layers], compiled=compile_blocks)
            if self._sharded:
                self._shard(stage, compute)
                stage.to_empty(device=self._home)
            else:
                materialize(stage, compute, mesh.device)
        named = {name: parameter for stage in stages for name, parameter in stage.named_parameters()}
        self._pipeline: Pipeline | None = None
        self._tied: TiedHead | None = None
        if plan.count > 1:
            self._pipeline = Pipeline(self._stages, plan, parallel, mesh, compute)
            if model.tied:
                self._tied = TiedHead(mesh, plan, named.get("embed.weight"), named.pop("head.weight", None))
        self._placed = {name: Placed.of(parameter, mesh) for name, parameter in named.items()}
        self._masters = MasterWeights(named) if not self._sharded and compute == torch.bfloat16 else None
        weights = named if self._masters is None else self._masters.masters
        for name, placed in self._placed.items():
            fill(
                local(weights[name]),
                model.initial(name),
                seed=seed,
                name=name,
                global_shape=placed.global_shape,
                offsets=placed.box.offsets,
                on=mesh.device,
            )
        # The optimizer works on plain local tensors that share the shards' storage: every elementwise optimizer is
        # right as it is, at none of DTensor's dispatch cost, and the others ask through MeshShards.
        self._parameters = [
            NamedParameter(
                *(name, nn.Parameter(local(named[name])) if self._masters is None else self._masters.masters[name]),
                *(placed.global_shape, model.decays(name), model.lr_scale(name)),
                computed=None if self._masters is None else local(named[name]),
            )
            for name, placed in self._placed.items()
        ]
        self._shards = MeshShards(mesh, self._placed)
        self.optimizer = make_optimizer(self._parameters, self._shards)
        folding = isinstance(self.optimizer, OnePass) and self.optimizer.one_pass
        self._one_pass = cast(OnePass, self.optimizer) if folding else None
        copies = torch.tensor([placed.copies for placed in self._placed.values()], dtype=torch.float64)
        self._per_copy = (1 / copies).to(self._home)
        self._moments = GradientMoments(mesh, self._placed, stages) if measures else None
        if self._moments is not None and not self._sharded:
            for name, parameter in named.items():
                self._moments.watch(name, parameter)
        self._measured: torch.Tensor | None = None
        self._measure = Measure.NOTHING

    def _shard(self, model: Llama, compute: torch.dtype) -> None:
        if compute == torch.bfloat16:
            policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        else:
            policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        # A pipeline gathers weights once per step. Its backward passes would keep them gathered anyway, and resharding
        # between the two halves of a zero-bubble backward pass gives wrong gradients without a word.
        keep = self._zero < 3 or self._parallel.pp > 1
        pinned = self.mesh.device.type == "cuda"
        place = CPUOffloadPolicy(pin_memory=pinned) if self._parallel.offload == "cpu" else OffloadPolicy()
        settings: dict[str, Any] = {"mesh": self.mesh.weights, "mp_policy": policy, "offload_policy": place}
        for block in model.layers.values():
            fully_shard(block, reshard_after_forward=not keep, **settings)
        if model.embed is not None and not model.tied:
            fully_shard(model.embed, reshard_after_forward=not keep, **settings)
        # What is left (norm, head, a tied embedding) is gathered at the root, where the loss reads the head's weight.
        fully_shard(model, reshard_after_forward=False, **settings)
        groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._groups += groups
        for group in groups:
            group.set_gradient_divide_factor(1.0)
            group.set_force_sum_reduction_for_comms(True)

    def _communicate(self, last: bool) -> None:
        """Tell FSDP2 which collectives this micro-batch needs (table in the module's docstring)."""
        if not self._sharded:
            return
        root = cast(FSDPModule, self.module)
        if self._zero < 3:
            root.set_reshard_after_backward(last)
        if self._zero < 2:
            root.set_requires_gradient_sync(last)
        else:
            root.set_requires_all_reduce(last)

    def _own(self, micro_batch: MicroBatch) -> tuple[MicroBatch, torch.Tensor | None]:
        """This rank's part of a micro-batch, on its device, and the positions where those can't be told from it."""
        if self._context is None:
            return micro_batch.to(self.mesh.device), None
        own = self._context.cut(micro_batch)
        return own.micro_batch.to(self.mesh.device), own.positions_BT.to(self.mesh.device, non_blocking=True)

    def _stage_inputs(self, micro_batch: MicroBatch) -> StageInputs:
        micro_batch, positions_BS = self._own(micro_batch)
        documents = micro_batch.documents_BS
        shared = {} if documents is None else {"documents_BS": documents}
        batch, length = micro_batch.tokens_BS.shape
        if self._slices_sequences:
            # What passes between stages is a rank's slice, from whose length a stage can't tell the positions.
            if positions_BS is None:
                plain = torch.arange(length, device=self.mesh.device).expand(batch, length)
                positions_BS = plain if documents is None else positions(documents)
            if stream_dim(batch, length, self.mesh.layout.tp) == 0:
                batch //= self.mesh.layout.tp
            else:
                length //= self.mesh.layout.tp
        if positions_BS is not None:
            shared["positions_BS"] = positions_BS
        hidden = (batch, length, self._width)
        return StageInputs(micro_batch.tokens_BS, micro_batch.targets_BS, shared, hidden)

    def _forward(self, micro_batch: MicroBatch) -> torch.Tensor:
        micro_batch, positions_BS = self._own(micro_batch)
        return self.module(micro_batch.tokens_BS, micro_batch.targets_BS, micro_batch.documents_BS, positions_BS)

    def accumulate(
        self, micro_batches: Sequence[MicroBatch], global_tokens: torch.Tensor, measure: Measure = Measure.NOTHING
    ) -> StepLoss:
        """Forward and backward of this rank's share."""
        assert micro_batches, "a rank without a micro-batch would leave its peers waiting in a collective"
        self._measure = measure
        if measure is not Measure.NOTHING:
            assert self._moments is not None, "this engine was built without `measures`"
            self._moments.begin(measure, [batch.valid_tokens for batch in micro_batches], global_tokens)
        if self._tied is not None:
            self._tied.fetch()
        if self._masters is not None:
            self._masters.begin(narrow=len(micro_batches) == 1 and self._one_pass is not None)
        halved = self.optimizer if isinstance(self.optimizer, AGVM) and self.optimizer.wants_halves else None
        half = len(micro_batches) // 2 - 1 if halved is not None else -1
        first_half: list[torch.Tensor] = []
        if self._pipeline is not None:
            total = self._pipeline.accumulate([self._stage_inputs(batch) for batch in micro_batches], global_tokens)
        else:
            total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
            for index, micro_batch in enumerate(micro_batches):
                self._communicate(last=index in (half, len(micro_batches) - 1))
                loss = self._forward(micro_batch)
                (loss / global_tokens).backward()
                total += loss.detach()
                if index == half:
                    first_half = [gradient.clone() for gradient in self._reduced()]
        if self._tied is not None:
            self._tied.give_gradient()
        if self._masters is None:
            for parameter, placed in zip(self._parameters, self._placed.values(), strict=True):
                gradient = placed.parameter.grad
                parameter.tensor.grad = None if gradient is None else own_part(gradient, placed.parameter)
        if halved is not None:
            assert first_half, "AGVM needs two micro-batches on every rank, and no pipeline"
            halved.observe_halves(first_half)
        return StepLoss(self._over_batch(total), global_tokens, {})

    def _reduced(self) -> list[torch.Tensor]:
        """Every parameter's gradient as it stands after a micro-batch that communicated."""
        if self._masters is not None:
            return self._gradients()
        places = [placed.parameter for placed in self._placed.values()]
        return [own_part(place.grad, place) for place in places if place.grad is not None]

    def _over_batch(self, total: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that hold different parts of the global batch, known to every stage's ranks afterwards."""
        self.mesh.sum(total, "data")
        return total if self._pipeline is None else self.mesh.sum(total, "pp")

    def _gradients(self) -> list[torch.Tensor]:
        return [p.tensor.grad for p in self._parameters if p.tensor.grad is not None]

    @torch.no_grad()
    def gradient_norm(self) -> torch.Tensor:
        """Each rank's squares, divided by the number of copies of each element, add up to every element counted once."""
        exact = self._parameters[0].tensor.dtype
        norms = torch.stack(torch._foreach_norm(self._gradients(), 2, exact)).double()
        present = torch.tensor([p.tensor.grad is not None for p in self._parameters])
        squares = (norms.square() * self._per_copy[present.to(self._per_copy.device)]).sum().to(self.mesh.device)
        if self._moments is None or self._measure is Measure.NOTHING:
            return self.mesh.sum(squares).sqrt()
        sums = self.mesh.sum(torch.stack([squares, self._moments.squares()]))  # one collective for both
        self._measured = sums
        return sums[0].sqrt()

    @torch.no_grad()
    def clip(self, max_norm: float, norm: torch.Tensor) -> None:
        """Scale by min(1, max_norm / (norm + 1e-6)), PyTorch's convention, without asking the device what the norm is."""
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).to(self._parameters[0].tensor)
        if self._one_pass is not None:
            self._one_pass.gradient_scale = scale
        else:
            torch._foreach_mul_(self._gradients(), scale)

    @torch.no_grad()
    def gradient_statistics(self, samples: int) -> GradientStatistics | None:
        """The measured moments. Waits for the device: a controller must know them before the next step begins."""
        if self._moments is None or self._measured is None:
            return None
        square, moments = self._measured.tolist()
        self._measured = None
        projection = None
        if self._measure is Measure.PROJECTIONS:
            gradients = [(p, cast(torch.Tensor, p.tensor.grad)) for p in self._parameters]
            gathers = [functools.partial(self._shards.gather, p, gradient.to(p.tensor.dtype)) for p, gradient in gradients]
            projection = float(self._moments.projection_square(gathers))
        workers = self._moments.workers
        if workers < 2:
            return None
        return GradientStatistics(moments, square, workers, samples / workers, projection)

    def update(self, lr: float) -> None:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        if self._masters is not None:
            self._masters.updated(copied=self._one_pass is not None)

    def zero_grad(self) -> None:
        """Forget the gradient."""
        if self._one_pass is not None:
            self._one_pass.gradient_scale = None
        for parameter, placed in zip(self._parameters, self._placed.values(), strict=True):
            parameter.tensor.grad = placed.parameter.grad = None

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> StepLoss:
        """Loss without gradients, over all ranks."""
        if self._tied is not None:
            self._tied.fetch()
        if self._masters is not None:
            self._masters.refresh()
        tokens = torch.tensor(sum(batch.valid_tokens for batch in micro_batches), dtype=torch.float64, device=self.mesh.device)
        if self._pipeline is not None:
            total = self._pipeline.evaluate([self._stage_inputs(batch) for batch in micro_batches])
        else:
            total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
            for micro_batch in micro_batches:
                total += self._forward(micro_batch)
        # Without a backward pass nobody frees the gathered weights, and the next step would use them, stale.
        for group in self._groups:
            group.reshard()
        # The ranks that share samples have each counted the whole of them.
        return StepLoss(self._over_batch(total), self.mesh.sum(tokens, "data") / self.mesh.layout.cp, {})

    def fragments(self) -> Iterator[Fragment]:
        """This rank's boxes of weights and of the optimizer's tensors that have a weight's shape."""
        for parameter, (name, placed) in zip(self._parameters, self._placed.items(), strict=True):
            if not placed.box.numel:
                continue
            arrays = {"weight": parameter.tensor.detach()}
            for role, value in self.optimizer.state[parameter.tensor].items():
                if torch.is_tensor(value) and value.shape == parameter.tensor.shape and value.dim():
                    arrays[role] = value
            for role, tensor in arrays.items():
                yield Fragment(name, role, placed.global_shape, placed.box, tensor)

    def prepare_restore(self) -> None:
        """Make the optimizer create its state: one update with a zero gradient at rate zero, which changes no weight."""
        for parameter in self._parameters:
            parameter.tensor.grad = torch.zeros_like(parameter.tensor)
        self.update(0.0)
        self.zero_grad()
        self.load_counters(dict.fromkeys(self.counters(), 0.0))

    def counters(self) -> dict[str, float]:
        """Scalar optimizer state, read off the first parameter: it is the same for every one."""
        state = self.optimizer.state[self._parameters[0].tensor]
        return {role: float(value) for role, value in state.items() if not torch.is_tensor(value) or value.dim() == 0}

    @torch.no_grad()
    def load_counters(self, counters: dict[str, float]) -> None:
        """Set the scalar state of every parameter."""
        for parameter in self._parameters:
            state = self.optimizer.state[parameter.tensor]
            for role, value in counters.items():
                if torch.is_tensor(state[role]):
                    state[role].fill_(value)
                else:
                    state[role] = type(state[role])(value)
