"""List the order in which each rank of a pipeline runs its actions, for every schedule. Imports no torch.

A run's order is that of torch's schedule classes (`parallel/pipeline/run.py`). Here the same orders are made from the papers'
rules, so that a plan needs no torch; a test holds the two to each other.
"""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..parallel.config import ParallelConfig
from ..parallel.pipeline.stages import legal_micro_batches, stage_count

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"


class Action(NamedTuple):
    """A micro-batch in a stage. kind: F forward, B whole backward, I backward to the input, W backward to the weights."""

    stage: int
    kind: str
    micro: int


Order = list[list[Action]]
"""By pipeline rank, its actions in order."""


def pipeline_order(parallel: ParallelConfig, micro_batches: int) -> Order:
    """List each rank's actions under `parallel.schedule`. Not to be changed: it is kept for the next who asks.

    Raises ValueError for a number of micro-batches that the schedule can't run.
    """
    if not legal_micro_batches(parallel, micro_batches):
        raise ValueError(f"{parallel.schedule} on {parallel.pp} ranks can't run {micro_batches} micro-batches")
    return _order(parallel.schedule, parallel.pp, stage_count(parallel) // parallel.pp, micro_batches)


@functools.lru_cache(maxsize=64)  # a search asks for a few orders again and again, for other sizes of other axes
def _order(schedule: str, ranks: int, chunks: int, micro_batches: int) -> Order:
    match schedule:
        case "gpipe":
            return [list(_one_stage(rank, micro_batches, ahead=micro_batches)) for rank in range(ranks)]
        case "1f1b":
            return [list(_one_stage(rank, micro_batches, ahead=ranks - rank)) for rank in range(ranks)]
        case "interleaved" | "zb":
            halves = schedule == "zb"
            return [list(_interleaved(rank, ranks, chunks, micro_batches, halves=halves)) for rank in range(ranks)]
        case "zbv":
            return [list(_zbv(rank, ranks, micro_batches)) for rank in range(ranks)]
        case _:
            return [list(_dualpipev(rank, ranks, micro_batches)) for rank in range(ranks)]


def repeated(parallel: ParallelConfig, micro_batches: int, least: int) -> int:
    """Return fewer micro-batches whose order differs only by repeating its middle less often: `least` rounds of `pp`.

    Returns the given number where there is no such middle.
    """
    few = least * parallel.pp
    return few if parallel.schedule != "gpipe" and micro_batches > few and micro_batches % parallel.pp == 0 else micro_batches


def _one_stage(stage: int, micro_batches: int, *, ahead: int) -> Iterator[Action]:
    """Yield `ahead` forward passes, then a backward and a forward pass in turn (arXiv 1806.03377, 2104.04473)."""
    forward = [Action(stage, FORWARD, micro) for micro in range(micro_batches)]
    yield from forward[:ahead]
    for micro in range(micro_batches):
        yield Action(stage, BACKWARD, micro)
        yield from forward[ahead + micro : ahead + micro + 1]


def _rounds(rank: int, ranks: int, chunks: Sequence[int], micro_batches: int, kind: str) -> list[Action]:
    """List a rank's passes of one kind: rounds of about `ranks` micro-batches go through its chunks one after another."""
    size = micro_batches // max(1, micro_batches // ranks)
    return [
        Action(chunk * ranks + rank, kind, micro)
        for start in range(0, micro_batches, size)
        for chunk in chunks
        for micro in range(start, start + size)
    ]


def _interleaved(rank: int, ranks: int, chunks: int, micro_batches: int, *, halves: bool) -> Iterator[Action]:
    """Yield interleaved 1F1B (arXiv 2104.04473, 2.2); with halves, the zero-bubble form of it (ZB1P of arXiv 2401.10241).

    A rank is ahead by what the ranks behind it need to come back to it. With halves, the weights' half of a backward pass
    follows `rank` backward passes later.
    """
    size = micro_batches // max(1, micro_batches // ranks)
    forward = _rounds(rank, ranks, range(chunks), micro_batches, FORWARD)
    backward = _rounds(rank, ranks, range(chunks - 1, -1, -1), micro_batches, INPUT if halves else BACKWARD)
    late = [Action(each.stage, WEIGHT, each.micro) for each in backward] if halves else []
    ahead = min((chunks - 1) * size + (1 if halves else 2) * (ranks - 1 - rank), len(forward))
    yield from forward[:ahead]
    for at, action in enumerate(backward):
        yield from forward[ahead + at : ahead + at + 1]
        yield action
        if halves and at >= rank:
            yield late[at - rank]
    yield from late[len(backward) - rank :] if len(backward) > rank else late


def _zbv(rank: int, ranks: int, micro_batches: int) -> Iterator[Action]:
    """Yield ZB-V (arXiv 2401.10241, section 6): stages run down the ranks and back, and what is not there is left out."""
    down, up, done = rank, 2 * ranks - 1 - rank, Counter[tuple[int, str]]()
    count = max(2 * ranks - 1, micro_batches)

    def step(stage: int, kinds: str) -> Iterator[Action]:
        for kind in kinds:
            action = Action(stage, kind, done[stage, kind])
            done[stage, kind] += 1
            if action.micro < micro_batches:
                yield action

    for _ in range(2 * (ranks - rank) - 1):
        yield from step(down, "F")
    for _ in range(rank):
        yield from step(up, "F")
        yield from step(down, "F")
    for _ in range(ranks - rank):
        yield from step(up, "FIW")
    while done[up, FORWARD] < done[down, FORWARD] or done[down, FORWARD] < count:
        yield from step(down, "FIW" if done[down, FORWARD] < count else "IW")
        yield from step(up, "FIW")
    for _ in range(rank):
        yield from step(down, "I")
        yield from step(up, "I")
    for _ in range(ranks - rank):
        yield from step(down, "IW")
    for stage in (up, down):
        yield from step(stage, "W" * (done[stage, INPUT] - done[stage, WEIGHT]))


def _dualpipev(rank: int, ranks: int, micro_batches: int) -> Iterator[Action]:
    """Yield DualPipeV (DeepSeek-V3, arXiv 2412.19437, folded): its eight phases, overlapped pairs one after the other."""
    down, up, done = rank, 2 * ranks - 1 - rank, Counter[tuple[int, str]]()
    late: deque[Action] = deque()

    def step(stage: int, kind: str) -> Iterator[Action]:
        counted = INPUT if kind == BACKWARD else kind
        action = Action(stage, kind, done[stage, counted])
        done[stage, counted] += 1
        if kind == INPUT:
            late.append(Action(stage, WEIGHT, action.micro))
        yield action

    def weights() -> Iterator[Action]:
        if late:
            yield late.popleft()

    behind = ranks - rank - 1
    for _ in range(2 * behind):
        yield from step(down, FORWARD)
    for _ in range(rank + 1):
        yield from step(down, FORWARD)
        yield from step(up, FORWARD)
    for _ in range(behind):
        yield from step(up, INPUT)
        yield from weights()
        yield from step(up, FORWARD)
    for _ in range(micro_batches - 2 * ranks + rank + 1):
        for stage, other in ((down, up), (up, down)):
            yield from step(stage, FORWARD)
            yield from step(other, BACKWARD)
    for _ in range(behind):
        yield from step(up, BACKWARD)
        yield from step(up, FORWARD)
        yield from step(down, BACKWARD)
    kinds = [BACKWARD if at < (rank + 1) // 2 else INPUT for at in range(rank + 1)]
    for at, kind in enumerate(kinds):
        # The half of the pair at which zero bubble begins depends on the rank's parity.
        first = kind if rank % 2 or at != (rank + 1) // 2 else BACKWARD
        yield from step(up, first)
        yield from step(down, kind)
    for _ in range(behind):
        yield from weights()
        yield from step(down, INPUT)
    for _ in range(rank + 1):
        yield from weights()
