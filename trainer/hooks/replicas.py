"""Compare copies of weights and optimizer state every so many steps and before saves, and go back where they differ."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...parallel.fragment import Fragment
from ...parallel.mesh import Mesh
from ...parallel.replicas import Disagreement, Replicas
from ..deferred import DeferredIntegers
from ..guard.guard import RewindNeeded, TrainingDiverged
from ..guard.journal import Rewind
from ..loop import Loop
from ..watch.incidents import Incident, IncidentLog
from .base import Hook

log = logging.getLogger(__name__)


@dataclass
class _Compared:
    """A comparison whose result is on its way to the host: the number of copies that differ, then the table."""

    step: int
    replicas: Replicas
    numbers: DeferredIntegers


class CompareReplicas(Hook):
    """Compares at every `every`-th step (0: never by itself), before saves, and at the end of the run; islands each their own.

    Hashes are computed on the device after the update. The host reads them with the step's numbers, which are a step late as a
    rule, so it does not wait for them; where it has these already (an evaluation or the controller needs them), at once. A save
    of a step comes or is confirmed after that, so no save holds what has not been compared.

    A difference has spread by then: every rank's gradient has seen it. So the run goes back to the last checkpoint, on which
    all agreed. When it comes by the step again, the element that differed tells which copy was wrong, if no majority has:
    the one that is much farther from its value now. The right one is not equal to it, for the wrong one was in its gradient.
    """

    def __init__(self, every: int, saves: tuple[int | None, ...], mode: str) -> None:
        """saves: every how many steps there are saves; mode: `trainer.on_bad_step`."""
        self._intervals = [each for each in (every, *saves) if each]
        self._mode = mode
        self._replicas: Replicas | None = None
        self._compared: _Compared | None = None
        self._unjudged: dict[int, Rewind] = {}
        self._to_judge: tuple[Rewind, _Compared] | None = None

    def on_run_begin(self, loop: Loop) -> None:
        """Say what is compared. A collective."""
        found = Replicas(loop.island, loop.engine.fragments())
        if loop.island.is_main:
            if not found.sets:
                log.info("no rank holds a copy of another's weights: nothing is compared (trainer.compare_replicas_every)")
            elif found.share < 1:
                share = 100 * found.share
                log.info("%.0f %% of the weights have copies, which are compared; nothing has a copy of the rest", share)
        if loop.guard is not None:
            ahead = [each for each in loop.guard.journal.rewinds if each.copies and each.step > loop.progress.step]
            self._unjudged = {each.step: each for each in ahead if _is_open(each.copies["values"])}
        # Not by this rank's own copies: a pipeline stage without any takes part in the collective, too.
        self._intervals = self._intervals if found.sets else []

    def on_step_end(self, loop: Loop) -> None:
        """Start a comparison if one is due. Raises as `on_metrics` where the step's numbers are known already."""
        self._judge(loop)
        step = loop.progress.step
        ends = loop.finished or loop.stopping  # a last save follows
        due = ends or step in self._unjudged or any(step % each == 0 for each in self._intervals)
        if not due or not self._intervals:
            return
        fragments: list[Fragment] = list(loop.engine.fragments())
        if self._replicas is None or not self._replicas.same_fragments(fragments):
            self._replicas = Replicas(loop.island, fragments)
        table = self._replicas.table()
        numbers = DeferredIntegers(torch.cat([self._replicas.differing(table)[None], table]))
        self._compared = _Compared(step, self._replicas, numbers)
        if loop.all_delivered:  # no row of this step is to come, and a save of it would be confirmed at once
            self._read(loop, self._compared)

    def on_repeat(self, loop: Loop, step: int) -> None:
        """Drop a comparison of a step that is taken again."""
        self._compared = None

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Read the comparison of the step. Raises RewindNeeded or TrainingDiverged on all ranks where copies differ."""
        if self._compared is not None and row["step"] >= self._compared.step:
            self._read(loop, self._compared)

    def _read(self, loop: Loop, compared: _Compared) -> None:
        self._compared = None
        differing, *table = compared.numbers.read()
        if not differing:
            if compared.step in self._unjudged:
                self._to_judge = self._unjudged.pop(compared.step), compared
                self._judge(loop)
            return
        found = [_in_whole_run(loop.island, each) for each in compared.replicas.disagreements(table)]
        where = "" if loop.engine.islands is None else f"island {loop.island.island_number}, "
        messages = [where + describe(compared.step, each) for each in found]
        if loop.island.is_main:
            for each, message in zip(found, messages, strict=True):
                rank = each.odd[0] if len(each.odd) == 1 else None
                details = {"holders": each.holders, "odd": each.odd, "arrays": each.arrays}
                self._write(loop, Incident("replicas_differ", message, compared.step, rank=rank, host=None, details=details))
        if self._mode == "stop" or loop.guard is None or loop.engine.islands is not None:  # an island can't go back alone
            raise TrainingDiverged(f"{messages[0]}. Resume from the last checkpoint, on which all agreed")
        first = found[0]
        values = {str(rank): each.hex() for rank, each in zip(first.holders, first.values, strict=True)}
        # The numbers of a step are read after a later update, as a rule. The replay's values must be those after the same.
        copies = {
            "array": first.arrays[0],
            "element": first.element,
            "values": values,
            "box": first.box,
            "read_at": loop.progress.step,
        }
        raise RewindNeeded(compared.step, messages[0], loop.guard.journal.data, copies=copies)

    def _judge(self, loop: Loop) -> None:
        """Tell which copies were wrong when they differed, now that they agree. A collective where they did."""
        if self._to_judge is None:
            return
        rewind, compared = self._to_judge
        read_at = rewind.copies.get("read_at", rewind.step)
        if loop.progress.step < read_at:
            return
        self._to_judge = None
        if loop.progress.step > read_at:  # the copies hold another step's weights
            return
        then = {int(rank): float.fromhex(value) for rank, value in rewind.copies["values"].items()}
        held = tuple(sorted(then))
        offsets, shape = rewind.copies.get("box", ((), ()))
        box = tuple(offsets), tuple(shape)
        values = compared.replicas.values(held, rewind.copies["array"], box, rewind.copies["element"])
        if not values:  # another layout
            return
        now = values[0]
        wrong = farther(then, now)
        judgement = (
            f"the copy of rank {', '.join(map(str, wrong))} was wrong" if wrong else "it does not tell which copy was wrong"
        )
        message = f"step {compared.step}, replayed: {judgement} ({rewind.copies['array']})"
        if loop.island.is_main:
            log.warning("%s", message)
            rank, details = wrong[0] if len(wrong) == 1 else None, {"wrong": wrong, "now": now, "then": then}
            self._write(loop, Incident("replicas_judged", message, compared.step, rank=rank, host=None, details=details))

    def _write(self, loop: Loop, incident: Incident) -> None:
        IncidentLog(loop.output_dir).write(incident)


CLEAR = 8.0
"""A copy is wrong if it is so many times farther from the replay's value than the nearest one."""


def farther(then: Mapping[int, float], now: float) -> list[int]:
    """Return the ranks whose values are much farther from the replay's than the nearest one is; empty if that is not clear."""
    distance = {rank: abs(value - now) if math.isfinite(value) else math.inf for rank, value in then.items()}
    least = min(distance.values())
    if any(least < each <= CLEAR * least for each in distance.values()):
        return []
    return [rank for rank, each in sorted(distance.items()) if each > least]


def _is_open(values: Mapping[str, str]) -> bool:
    """Return whether it is open which copies were wrong: no value was that of more than half of them."""
    return bool(values) and 2 * max(Counter(values.values()).values()) <= len(values)


def _in_whole_run(mesh: Mesh, found: Disagreement) -> Disagreement:
    """Name ranks by their numbers in the whole run."""
    holders, odd = (tuple(map(mesh.global_rank, ranks)) for ranks in (found.holders, found.odd))
    return replace(found, holders=holders, odd=odd)


def describe(step: int, found: Disagreement) -> str:
    """Return who differs in what, in one line without its full stop."""
    ranks, holders = ", ".join(map(str, found.odd)), len(found.holders)
    who = (
        f"rank {ranks} differs from the other {holders - len(found.odd)}"
        if found.odd != found.holders
        else f"ranks {ranks} differ"
    )
    what = ", ".join(found.arrays[:3]) + (f" and {len(found.arrays) - 3} more" if len(found.arrays) > 3 else "")
    return f"step {step}: copies of the same arrays do not agree: {who}, in {what}"
