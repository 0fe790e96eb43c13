"""Replay a step that was skipped, with its own weights, to find out where a number went wrong: rank, layer, samples.

The passes run once more with hooks on modules and weights, which an ordinary step does without. Then every data rank runs its
neighbour's share: what moves with the samples is the data's fault, and what stays on its rank is the device's. What does not
come again was a passing fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ...data.assignment import Assigner, Share
from ...data.batch import GlobalBatch
from ...models.protocol import Model

if TYPE_CHECKING:
    from ..loop import Loop

DATA, DEVICE, WEIGHTS, PASSING, UNKNOWN = "data", "device", "weights", "passing fault", "unknown"
AGAIN = "comes again"


@dataclass(frozen=True)
class Trace:
    """The first number of a rank's share that is not finite.

    rank    its number in the whole run
    pass_   forward pass, backward pass, or gradient of a weight
    layer   the module, or the weight
    number  of the micro-batch among the rank's own
    rows    of the micro-batch; empty where a weight's gradient does not tell
    """

    rank: int
    pass_: str
    layer: str
    number: int
    rows: tuple[int, ...] = ()


@dataclass
class Diagnosis:
    """The finding of a replay.

    kind     DATA, DEVICE, WEIGHTS (which bear no sample), PASSING, UNKNOWN, or of a spike AGAIN
    traces   of the ranks on which a number went wrong, in the replay on the same ranks
    samples  of the run, in whose rows it did; empty unless all traces have rows: a micro-batch is the layout's, not the run's
    broken   the arrays of the weights and the optimizer that are not finite themselves
    """

    kind: str
    traces: list[Trace] = field(default_factory=list[Trace])
    samples: list[int] = field(default_factory=list[int])
    broken: list[str] = field(default_factory=list[str])

    @property
    def ranks(self) -> list[int]:
        """The ranks on which a number went wrong."""
        return sorted({trace.rank for trace in self.traces})

    def describe(self) -> str:
        """Return a sentence without its full stop."""
        if self.kind == PASSING:
            return "a replay of it on the same ranks is in order: a passing fault"
        if self.kind == AGAIN:
            return "it comes again in a replay"
        found = (
            "; ".join(f"rank {t.rank}, {t.pass_} of {t.layer}" for t in self.traces[:4]) or "no rank's own numbers show where"
        )
        where = f"replayed: {found}"
        if self.samples:
            where += f"; samples {_some(self.samples)} of the run"
        return (
            where
            + {
                DATA: "; another rank finds the same in them: bad data, or weights that can't bear them",
                DEVICE: "; another rank finds nothing in the same samples: a bad device",
                WEIGHTS: f"; not finite themselves: {_some(self.broken)}"
                if self.broken
                else "; every sample is affected: it is the weights",
                UNKNOWN: "",
            }[self.kind]
        )


@dataclass
class _Watch:
    """Hooks of one replay on this rank."""

    rank: int
    share: Share
    found: list[Trace] = field(default_factory=list[Trace])
    passes: dict[nn.Module, int] = field(default_factory=dict[nn.Module, int])

    def attach(self, module: nn.Module) -> list[Any]:
        """Watch the stages in a module, their blocks, what stands beside these, and the gradients of weights."""
        stages = list(module) if isinstance(module, nn.ModuleList) else [module]
        handles: list[Any] = []
        for stage in stages:
            handles.append(stage.register_forward_pre_hook(self._count))  # interleaved, each stage has its own turn
            blocks = {id(block): f"layer {layer}" for layer, block in _blocks(stage)}
            inside = {id(part) for part in stage.modules() if id(part) in blocks for part in part.modules()}
            for name, part in stage.named_modules():
                if id(part) in blocks:
                    handles.append(part.register_forward_hook(self._see_output(stage, blocks[id(part)])))
                elif id(part) not in inside and name and not list(part.children()):
                    handles.append(part.register_forward_hook(self._see_output(stage, name)))
            for name, weight in stage.named_parameters():
                if weight.requires_grad:
                    handles.append(weight.register_hook(self._see_gradient(stage, name)))
        return handles

    def _count(self, stage: nn.Module, _inputs: object) -> None:
        self.passes[stage] = self.passes.get(stage, 0) + 1

    def _number(self, stage: nn.Module) -> int:
        """Return the number of the micro-batch whose forward pass the stage ran last."""
        return (self.passes.get(stage, 1) - 1) % len(self.share.micro_batches)

    def _see_output(self, stage: nn.Module, layer: str) -> Callable[[nn.Module, object, object], None]:
        def see(_module: nn.Module, _inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                return
            number = self._number(stage)
            self._note("forward pass", layer, number, tensor)
            if tensor.requires_grad:

                def see_gradient(gradient: torch.Tensor) -> None:
                    self._note("backward pass", layer, number, gradient)

                tensor.register_hook(see_gradient)

        return see

    def _see_gradient(self, stage: nn.Module, weight: str) -> Callable[[torch.Tensor], None]:
        return lambda gradient: self._note("gradient of a weight", weight, self._number(stage), gradient)

    def _note(self, pass_: str, layer: str, number: int, tensor: torch.Tensor) -> None:
        if any(trace.number == number for trace in self.found):
            return  # of each micro-batch the first is where it began
        here = tensor.detach()
        here = here.to_local() if isinstance(here, DTensor) else here
        wrong = ~here.isfinite()
        if bool(wrong.any()):
            # Where a layer's output is not (B, S, D), its rows are not those of the micro-batch.
            batch = self.share.micro_batches[number]
            known = here.dim() == 3 and here.shape[0] == len(batch.tokens_BS)
            rows = wrong.flatten(1).any(1).nonzero().flatten().tolist() if known else []
            self.found.append(Trace(self.rank, pass_, layer, number, tuple(rows)))


def _blocks(stage: nn.Module) -> list[tuple[int, nn.Module]]:
    return list(stage.block_modules().items()) if isinstance(stage, Model) else []


def replay(loop: Loop, batch: GlobalBatch, *, by_worker: bool = False) -> Diagnosis:
    """Find out why a step's loss or gradient was not finite. All ranks call it, between steps; nothing is updated.

    batch: of the step, whose weights must be in place. Takes two or three steps' time.
    by_worker: whether the step was dealt so (`Dealer.load`)
    """
    first, wrong = _pass(loop, batch, 0, by_worker)
    if not wrong:
        return Diagnosis(PASSING)
    broken = _broken_arrays(loop)
    suspects = _suspects(loop, batch, first, 0)
    samples = suspects if all(trace.rows for trace in first) else []
    if broken or 1 < len(samples) == batch.count:
        return Diagnosis(WEIGHTS, first, broken=broken)
    diagnosis = Diagnosis(UNKNOWN, first, samples)
    dealer, ranks = loop.batches.dealer, loop.island.layout.data_size
    if ranks == 1 or not isinstance(dealer, Assigner) or not first:
        return diagnosis
    second, _ = _pass(loop, batch, 1, by_worker)
    moved = _suspects(loop, batch, second, 1)
    if set(suspects) & set(moved):
        diagnosis.kind = DATA
    elif not second or {trace.rank for trace in second} & set(diagnosis.ranks):
        diagnosis.kind = DEVICE
        diagnosis.samples = []
    return diagnosis


SAME_LOSS, SAME_NORM = 0.01, 0.1
"""Relative differences from a spike's loss and gradient norm within which a replay has met it again, in any precision."""


def replay_spike(loop: Loop, batch: GlobalBatch, loss: float, norm: float, *, by_worker: bool = False) -> Diagnosis:
    """Find out whether a step's finite loss and gradient norm come again. All ranks call it, as `replay`."""

    def comes_again(by: int) -> bool:
        found, there = _sums(loop, _share(loop, batch, by, by_worker))
        return abs(found - loss) <= SAME_LOSS * abs(loss) and abs(there - norm) <= SAME_NORM * norm

    if not comes_again(0):
        return Diagnosis(PASSING)
    dealer, ranks = loop.batches.dealer, loop.island.layout.data_size
    if ranks == 1 or not isinstance(dealer, Assigner):
        return Diagnosis(AGAIN)
    return Diagnosis(DATA if comes_again(1) else DEVICE)


def _broken_arrays(loop: Loop) -> list[str]:
    """Return the names of weights and optimizer state that are not finite on some rank."""
    floating = [each for each in loop.engine.fragments() if each.tensor.is_floating_point()]
    mine = [each.key for each in floating if not bool(each.tensor.isfinite().all())]
    return sorted({key for keys in loop.island.gather_objects(mine[:8]) for key in keys})


def _pass(loop: Loop, batch: GlobalBatch, by: int, by_worker: bool) -> tuple[list[Trace], bool]:
    """Run the step's passes, each data rank those of the rank `by` further on.

    Return the traces of all ranks, and whether the loss or the gradient norm is not finite.
    """
    share = _share(loop, batch, by, by_worker)
    watch = _Watch(loop.mesh.rank, share)
    handles = watch.attach(loop.engine.module)
    try:
        loss, norm = _sums(loop, share)
    finally:
        for handle in handles:
            handle.remove()
    wrong = not (math.isfinite(loss) and math.isfinite(norm))
    return [trace for found in loop.island.gather_objects(watch.found) for trace in found], wrong


def _sums(loop: Loop, share: Share) -> tuple[float, float]:
    """Run a share's passes. Return the loss of the global batch and the norm of its gradient, which is discarded."""
    tokens, _ = loop.sum_over_ranks(share.valid_tokens, stop_requested=False)
    loss = loop.engine.accumulate(share, tokens)
    norm = loop.engine.gradient_norm()
    loop.engine.zero_grad()
    return float(loss.mean), float(norm)


def _share(loop: Loop, batch: GlobalBatch, by: int, by_worker: bool) -> Share:
    data_rank = (loop.island.data_rank + by) % loop.island.layout.data_size
    micro = loop.controller.micro_at(batch.count)
    return loop.batches.dealer.load(loop.batches.samples, batch, micro, data_rank, by_worker=by_worker)


def _suspects(loop: Loop, batch: GlobalBatch, traces: Sequence[Trace], by: int) -> list[int]:
    """Return the run's samples in whose rows the traces lie; all of the rank where rows are not known.

    A weight's gradient does not tell its micro-batch: in a pipeline the forward passes of others have come in between.
    """
    dealer, layout = loop.batches.dealer, loop.island.layout
    if not isinstance(dealer, Assigner):
        return []
    dealt = dealer.assign(batch, loop.controller.micro_at(batch.count)).ranks
    first = loop.island.global_rank(0)  # ranks of an island are consecutive
    found: set[int] = set()
    for trace in traces:
        share = dealt[(layout.data_rank(trace.rank - first) + by) % layout.data_size]
        if trace.rows:
            found |= {share[trace.number][row] for row in trace.rows if row < len(share[trace.number])}
        else:
            found |= {index for indices in share for index in indices}
    return sorted(found)


def _some(numbers: Sequence[object]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
