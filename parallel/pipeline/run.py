"""Pipeline parallelism: a step's micro-batches passed through stages on several ranks, by torch's own schedules.

The loss keeps rule R2: the last stage returns the *sum* of token losses of a micro-batch, which is divided by the tokens
of the whole global batch, and the schedule scales nothing. Gradients are reduced over the data-parallel ranks once, after
a stage's last backward pass, whatever the ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.torch_version import TorchVersion

from ..config import ParallelConfig
from ..mesh import Mesh
from .lean_stage import LeanStage
from .stages import StagePlan, legal_micro_batches, schedule_of

SPLITS_THE_LOSS = TorchVersion(torch.__version__) >= "2.13"
"""True if torch can run the backward pass of an `autograd.Function` (our loss) in two halves. Before 2.13 it raises."""

EVALUATED_AT_ONCE = 4
"""Micro-batches per rank that an evaluation sends before it waits: enough to keep ranks busy, and a bound on memory."""


@dataclass(frozen=True)
class StageInputs:
    """The inputs of the stages for one micro-batch.

    tokens   (B, S) int64, for the first stage
    targets  (B, S) int64, for the last
    shared   keyword arguments of every stage
    hidden   shape of what passes between stages, (B, S', D)
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    shared: dict[str, Any]
    hidden: tuple[int, ...]


class Pipeline:
    """This rank's stages, and the schedule that passes micro-batches through all stages."""

    def __init__(
        self, modules: Mapping[int, nn.Module], plan: StagePlan, parallel: ParallelConfig, mesh: Mesh, compute: torch.dtype
    ) -> None:
        """modules: this rank's stages by stage index; compute: dtype of what passes between stages."""
        self._modules, self._plan, self._parallel, self._mesh, self._compute = modules, plan, parallel, mesh, compute
        self._rank = mesh.coordinates["pp"]
        self._group = mesh.group("pp")
        self._holds_first, self._holds_last = 0 in modules, plan.count - 1 in modules
        self._batches: Sequence[StageInputs] = ()  # of the step under way
        self._built: tuple[Any, Any] | None = None  # (what the schedule was built for, the schedule)
        self._global_tokens = self._total = torch.zeros((), device=mesh.device)

    def accumulate(self, batches: Sequence[StageInputs], global_tokens: torch.Tensor) -> torch.Tensor:
        """Run forward and backward of this rank's stages. Returns the sum of token losses (0 off the last stage's rank)."""
        schedule = self._schedule(batches)
        self._global_tokens = global_tokens
        self._total = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        self._batches = batches
        # torch needs a target to split. The real targets come with the micro-batches (`_chunks`).
        target = torch.empty(len(batches)) if self._holds_last else None
        schedule.step(target=target, return_outputs=False)
        self._batches = ()
        return self._total

    def _chunks(self, _args: object, _kwargs: object = None) -> tuple[list[Any], list[dict[str, Any]]]:
        """Return the arguments of each micro-batch, in place of torch's `_split_inputs` of a whole batch."""
        arguments = [(batch.tokens,) if self._holds_first else () for batch in self._batches]
        last = self._holds_last
        return arguments, [{**batch.shared, **({"targets_BS": batch.targets} if last else {})} for batch in self._batches]

    def _loss(self, total: torch.Tensor, _target: torch.Tensor) -> torch.Tensor:
        self._total += total.detach()
        return total / self._global_tokens

    def _schedule(self, batches: Sequence[StageInputs]) -> Any:
        """Return the schedule for these micro-batches, cached until their number or shape changes."""
        shapes = {(tuple(batch.tokens.shape), batch.hidden) for batch in batches}
        assert len(shapes) == 1, f"micro-batches of different shapes {shapes} can't go through a pipeline"
        assert legal_micro_batches(self._parallel, len(batches)), f"{self._parallel.schedule} can't run {len(batches)} passes"
        key = (len(batches), shapes)
        if self._built is None or self._built[0] != key:
            self._built = (key, self._build(batches[0], len(batches)))
        return self._built[1]

    def _build(self, like: StageInputs, count: int) -> Any:
        def passed() -> torch.Tensor:
            return torch.empty(like.hidden, dtype=self._compute, device="meta", requires_grad=True)

        loss_dtype = torch.promote_types(self._compute, torch.float32)
        chosen = schedule_of(self._parallel)
        stages: list[LeanStage] = []
        for index, module in self._modules.items():
            last = index == self._plan.count - 1
            stage = LeanStage(
                module,
                index,
                self._plan.count,
                self._mesh.device,
                input_args=passed() if index else torch.empty(like.tokens.shape, dtype=like.tokens.dtype, device="meta"),
                output_args=torch.empty((), dtype=loss_dtype, device="meta", requires_grad=True) if last else passed(),
                group=self._group,
                dw_builder=_no_weight_gradient if last and chosen.splits_backward and not SPLITS_THE_LOSS else None,
            )
            stage.compute_time = self._mesh.compute_time
            stages.append(stage)
        make = cast(Callable[..., Any], get_schedule_class(chosen.torch_name))
        single = chosen.stages_per_rank == 1 and chosen.fixed
        schedule = make(stages[0] if single else stages, count, loss_fn=self._loss, scale_grads=False)
        schedule._split_inputs = self._chunks
        return schedule

    @torch.no_grad()
    def evaluate(self, batches: Sequence[StageInputs]) -> torch.Tensor:
        """Run forward only, for any number of micro-batches of any shapes. Returns the sum of token losses, as `accumulate`."""
        total = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        at_once = EVALUATED_AT_ONCE * self._parallel.pp
        for start in range(0, len(batches), at_once):
            total += self._pass(batches[start : start + at_once])
        return total

    def _pass(self, batches: Sequence[StageInputs]) -> torch.Tensor:
        """Pass these micro-batches through all stages.

        A stage posts all its receives before its first send: two ranks that send to each other over one channel
        (the ends of an interleaved pipeline of two ranks) then never wait for each other.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        self._mesh.heartbeat.beat(self._mesh.heartbeat.phase)  # the same as before, but it goes on
        ranks = self._plan.ranks
        sends: list[tuple[torch.Tensor, Any]] = []
        outputs: list[torch.Tensor] = []
        for index, module in self._modules.items():
            last = index == self._plan.count - 1
            works: list[Any] = [None] * len(batches)
            if index == 0:
                inputs = [batch.tokens for batch in batches]
            elif ranks[index - 1] == self._rank:
                inputs = outputs
            else:
                inputs = [torch.empty(batch.hidden, dtype=self._compute, device=self._mesh.device) for batch in batches]
                works = [dist.irecv(x, group=self._group, group_src=ranks[index - 1]) for x in inputs]
            outputs = []
            for x, work, batch in zip(inputs, works, batches, strict=True):
                if work is not None:
                    work.wait()
                y = module(x, **batch.shared, **({"targets_BS": batch.targets} if last else {}))
                if last:
                    total += y
                elif ranks[index + 1] == self._rank:
                    outputs.append(y)
                else:
                    y = y.contiguous()
                    sends.append((y, dist.isend(y, group=self._group, group_dst=ranks[index + 1])))
        for _, work in sends:
            work.wait()
        return total


def _no_weight_gradient() -> Callable[[], None]:
    """Make a second half of a backward pass that does nothing, for a stage whose first half does all (torch's `dw_builder`)."""
    return lambda: None
