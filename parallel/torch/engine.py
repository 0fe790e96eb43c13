"""TorchEngine: DTensor, FSDP2 and whole weights behind the Engine protocol.

Weights that every data-parallel rank holds whole are kept as `masters.py` tells: ZeRO-0 and 1, and any stage where there is
only one such rank. FSDP2 does the rest (`fully_sharded.py`): ZeRO-2 and 3, offload, and every stage of a pipeline.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from ...data.assignment import Share
from ...data.batch import MicroBatch
from ...kernels.attention import positions
from ...models.llama import Llama
from ...optim.optimizers.agvm import AGVM
from ...optim.optimizers.parameters import NamedParameter, OnePass, before_updates
from ..config import ParallelConfig
from ..context.split import ContextParallel
from ..engine import EngineSettings, OptimizerFactory, StepLoss, send
from ..fragment import Fragment
from ..gradient_noise import GradientMoments, Measure, Moments
from ..layout import uses_fsdp
from ..mesh import Mesh
from ..pipeline.run import Pipeline, StageInputs, TiedHead
from ..pipeline.stages import balanced_stages
from ..policies import block_policies
from ..shards import MeshShards, Placed, local, own_part, placements_of
from ..tensor.placements import stream_dim
from .assembly import apply_forms, fill_weights, fuses_swiglu, own_stages
from .fully_sharded import ZeroGroups
from .masters import MasterWeights, materialize
from .transport import choose_transport


class TorchEngine:
    """See the module's docstring; methods are documented in `engine.Engine`."""

    def __init__(
        self, model: Llama, mesh: Mesh, make_optimizer: OptimizerFactory, parallel: ParallelConfig, settings: EngineSettings
    ) -> None:
        """model: on the meta device; it is cut, given storage and its initial weights here."""
        self.mesh = mesh
        self._parallel, self._settings = parallel, settings
        self._width = model.dim
        self._slices_sequences = mesh.layout.tp > 1 and parallel.sequence_parallel
        # Where shards, gradients and optimizer state live: with CPU offload, FSDP2 copies to and from it.
        self._home = torch.device("cpu") if parallel.offload == "cpu" else mesh.device

        model.to(settings.storage)
        policies = block_policies(model.config, parallel, settings)
        plan = balanced_stages(model.config, parallel, settings.seq_len, policies)
        self._stages = own_stages(model, plan, mesh.coordinates["pp"])
        self._context = ContextParallel(mesh, parallel.cp_kind) if mesh.layout.cp > 1 else None
        self._transport = choose_transport(mesh, parallel)
        fsdp = uses_fsdp(parallel, mesh.layout)
        self._zero = ZeroGroups(mesh, parallel, settings.compute, self._transport) if fsdp else None
        fuse = fuses_swiglu(model, mesh, parallel, settings, policies)
        for stage in self._stages.values():
            apply_forms(stage, policies, mesh, self._context, parallel, settings, fuse_swiglu=fuse)
            self._give_storage(stage)
        stages = list(self._stages.values())
        self.module: nn.Module = stages[0] if len(stages) == 1 else nn.ModuleList(stages)
        named = {name: parameter for stage in stages for name, parameter in stage.named_parameters()}
        self._pipeline = Pipeline(self._stages, plan, parallel, mesh, settings.compute) if plan.count > 1 else None
        self._tied: TiedHead | None = None
        if plan.count > 1 and model.tied:
            self._tied = TiedHead(mesh, plan, named.get("embed.weight"), named.pop("head.weight", None))

        self._placed = {name: Placed.of(parameter, mesh) for name, parameter in named.items()}
        self._masters: MasterWeights | None = None
        if self._zero is None:
            self._masters = MasterWeights(stages, named, mesh, settings.storage, self._transport)
            self._placed = {name: placed.cut(mesh.axes["weights"]) for name, placed in self._placed.items()}
        copies = torch.tensor([placed.copies for placed in self._placed.values()], dtype=torch.float64)
        self._per_copy = (1 / copies).to(self._home)
        weights = named if self._masters is None else self._masters.masters
        fill_weights(weights, self._placed, model, settings.seed, mesh.device)

        self._parameters = self._named_parameters(model, named)
        self._shards = MeshShards(mesh, self._placed)
        self.optimizer = make_optimizer(self._parameters, self._shards)
        folding = isinstance(self.optimizer, OnePass) and self.optimizer.one_pass
        self._one_pass = cast(OnePass, self.optimizer) if folding else None

        self._moments = GradientMoments(mesh, self._placed)
        if settings.measures:
            self._watch(named)

    def _give_storage(self, stage: Llama) -> None:
        """Cut a stage's weights over the ranks that share them, and give this rank's part memory."""
        if self._zero is None:
            materialize(stage, self._settings.compute, self.mesh.device, self._transport)
        else:
            self._zero.shard(stage)
            stage.to_empty(device=self._home)

    def _named_parameters(self, model: Llama, named: Mapping[str, nn.Parameter]) -> list[NamedParameter]:
        """The parameters as the optimizer sees them: plain local tensors that share the shards' storage.

        So every elementwise optimizer is right as it is, at none of DTensor's dispatch cost; others ask through MeshShards.
        """
        masters = self._masters

        def seen(name: str, placed: Placed) -> NamedParameter:
            tensor = nn.Parameter(local(named[name])) if masters is None else masters.masters[name]
            computed = masters.own[name] if masters is not None and masters.separate else None
            return NamedParameter(name, tensor, placed.global_shape, model.decays(name), model.lr_scale(name), computed)

        return [seen(name, placed) for name, placed in self._placed.items()]

    def _watch(self, named: Mapping[str, nn.Parameter]) -> None:
        """See every micro-batch's gradient of every weight: as FSDP2 gathers them, or where nothing is gathered at once."""
        if self._zero is not None:
            self._moments.watch_groups(list(self._stages.values()))
            return
        for name, parameter in named.items():
            self._moments.watch(name, parameter)

    def _own(self, micro_batch: MicroBatch) -> tuple[MicroBatch, torch.Tensor | None]:
        """This rank's part of a micro-batch, on its device, and the positions where those can't be told from it."""
        micro_batch = send(micro_batch, self.mesh.device)
        if self._context is None:
            return micro_batch, None
        own = self._context.cut(micro_batch)
        return own.micro_batch, own.positions_BT

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

    def accumulate(self, share: Share, global_tokens: torch.Tensor, measure: Measure = Measure.NOTHING) -> StepLoss:
        """Forward and backward of this rank's share."""
        micro_batches = share.micro_batches
        assert micro_batches, "a rank without a micro-batch would leave its peers waiting in a collective"
        self._moments.begin(share, global_tokens, measure)
        if self._tied is not None:
            self._tied.fetch()
        if self._masters is not None:
            self._masters.begin(share.passes, one_pass=self._one_pass is not None)
        halved = self.optimizer if isinstance(self.optimizer, AGVM) and self.optimizer.wants_halves else None
        half = -1
        if halved is not None:
            assert share.first_half, "AGVM needs a batch dealt in halves, of two micro-batches or more"
            half = share.first_half - 1
        first_half: list[torch.Tensor] = []
        if self._pipeline is not None:
            total = self._pipeline.accumulate([self._stage_inputs(batch) for batch in micro_batches], global_tokens)
        else:
            total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
            for index, micro_batch in enumerate(micro_batches):
                last = index in (half, len(micro_batches) - 1)
                if self._zero is not None:
                    self._zero.expect(self.module, last)
                if self._masters is not None:
                    self._masters.expect(last)
                loss = self._forward(micro_batch)
                (loss / global_tokens).backward()
                total += loss.detach()
                if index == half:
                    self._take_gradients()
                    first_half = [gradient.clone() for gradient in self._gradients()]
        if self._tied is not None:
            self._tied.give_gradient()
        self._take_gradients()
        if halved is not None:
            assert first_half, "AGVM can't see the halves of a batch through a pipeline"
            halved.observe_halves(first_half)
        return StepLoss(self._over_batch(total), global_tokens, {})

    def _take_gradients(self) -> None:
        """After a micro-batch that communicated: every parameter has its gradient as it stands."""
        if self._masters is not None:
            self._masters.complete()
            return
        for parameter, placed in zip(self._parameters, self._placed.values(), strict=True):
            gradient, placements = placed.parameter.grad, placements_of(placed.parameter)
            parameter.tensor.grad = None if gradient is None else own_part(gradient, placements)

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
        present = [index for index, p in enumerate(self._parameters) if p.tensor.grad is not None]
        # The rule is that all have one, and then no index has to reach the device, which the host would wait for.
        per_copy = self._per_copy if len(present) == len(self._parameters) else self._per_copy[present]
        squares = (norms.square() * per_copy).sum().to(self.mesh.device)
        return self._moments.norm(squares)

    @torch.no_grad()
    def clip(self, max_norm: float, norm: torch.Tensor) -> None:
        """Scale by min(1, max_norm / (norm + 1e-6)), PyTorch's convention, without asking the device what the norm is."""
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).to(self._parameters[0].tensor)
        if self._one_pass is not None:
            self._one_pass.gradient_scale = scale
        else:
            torch._foreach_mul_(self._gradients(), scale)

    @torch.no_grad()
    def gradient_moments(self, samples: int) -> Moments | None:
        """What `gradient_norm` summed up and, where asked for, the projections on the whole gradient."""
        found = self._moments.moments(samples)
        if found is None or not self._moments.projects:
            return found
        gradients = [(p, cast(torch.Tensor, p.tensor.grad)) for p in self._parameters]
        gathers = [functools.partial(self._shards.gather, p, gradient.to(p.tensor.dtype)) for p, gradient in gradients]
        projection = self._moments.projection_square(gathers)
        return replace(found, scalars={**found.scalars, "projection_square": projection})

    def update(self, lr: float) -> None:
        """One optimizer step."""
        if self._masters is not None:
            self._masters.settle(rows=self._one_pass is not None)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        if self._masters is not None:
            self._masters.spread(copied=self._one_pass is not None)

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
        if self._zero is not None:
            self._zero.reshard()
        # The ranks that share samples have each counted the whole of them.
        return StepLoss(self._over_batch(total), self.mesh.sum(tokens, "data") / self.mesh.layout.cp, {})

    def fragments(self) -> Iterator[Fragment]:
        """This rank's boxes of weights and of the optimizer's tensors that have a weight's shape."""
        if self._masters is not None:
            self._masters.settle()
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
        self.load_counters(before_updates(self.optimizer, self.counters()))

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
        if self._masters is not None:
            self._masters.written()

    def finish(self) -> None:
        """Weights may still be gathered. A thread that ends such work while the interpreter does takes the process with it."""
        if self._masters is not None:
            self._masters.settle(rows=True)
