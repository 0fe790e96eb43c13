"""The record of a run's stages: where each began, and how much of the data was read. It is all the state that they have."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...config.duration import Duration, Unit
from ...config.nodes import find_option
from ...config.problems import Problem
from ...data.config import OPTIONS, DataMixtureConfig
from ...data.node import DataNode
from ...data.reading import Read, samples_read
from ...optim.history import ChangePoint
from ...optim.progress import BEGINNING, Progress
from .written import Stage


@dataclass(frozen=True)
class StageRecord:
    """The stages that a run has begun, in order.

    begun        name of each, and the run's counters at its beginning
    read         source of data → which of its samples the run has read (`data/reading.py`)
    read_before  as `read`, when the current data began
    read_known   False for an older checkpoint without stages whose data are a mixture: it does not state what it read
    """

    begun: tuple[tuple[str, ChangePoint], ...] = ()
    read: Read = field(default_factory=dict[str, list[int]])
    read_before: Read = field(default_factory=dict[str, list[int]])
    read_known: bool = True

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        begun = [[name, *point] for name, point in self.begun]
        return {"begun": begun, "read": dict(self.read), "read_before": dict(self.read_before)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StageRecord:
        """Restore the record of a checkpoint's state. One that was saved without stages has begun none."""
        saved = state.get("stages")
        if saved:
            begun = tuple((name, ChangePoint(*point)) for name, *point in saved["begun"])
            return cls(begun, saved["read"], saved["read_before"])
        if "progress" not in state:  # an import
            return cls()
        if find_option(OPTIONS, state.get("config", {}).get("data", {}).get("_target_")) is DataMixtureConfig:
            return cls(read_known=False)
        return cls(read={state["data_fingerprint"]: [state["progress"]["samples"]]})

    def absent(self) -> Iterator[Problem]:
        """Yield what is wrong with a resumed run that has no stages."""
        if self.begun:
            message = "the checkpoint's run has stages, and this one has none: it would read samples again"
            yield Problem("stages", message, "keep them, and add one to go on")

    def problems(self, stages: Sequence[Stage], tokens: int, saved: Sequence[Stage]) -> Iterator[Problem]:
        """Yield how the stages of a resumed run contradict those that it has been through.

        tokens: of the run so far; saved: the stages as the checkpoint states them
        """
        names, known = [stage.name for stage in stages], [name for name, _ in self.begun]
        if names[: len(known)] != known:
            fix = "keep their names and order, and change only what comes after them"
            yield Problem("stages", f"the checkpoint has begun {', '.join(known)}, and these are {', '.join(names)}", fix)
            return
        for stage, before in zip(stages[: max(0, len(known) - 1)], saved, strict=False):
            if stage.end != before.end:
                ended = f"the stage has ended, at {before.end:,} tokens of the run, and can't end at {stage.end:,}"
                yield Problem(f"{stage.key}.tokens", ended, "leave it as it was, and change the stages after it")
                return  # those after it end elsewhere for the same reason
        if not self.read_known:
            changed = [stage for stage in stages[1 : stage_at(stages, tokens) + 1] if stage.names("data")]
            if changed:
                name = changed[0].name
                message = f"stage '{name}' changes the data, and the checkpoint does not state what was read of each source"
                fix = f"let stage '{stages[0].name}' end behind the run's {tokens:,} tokens: what it saves states it"
                yield Problem("stages", message, fix)

    def at(self, stages: Sequence[Stage], number: int, progress: Progress, seq_len: int) -> StageRecord:
        """Return the record of a run in stage `number`, which begins now where it has not begun.

        Stages that are not recorded, of a run that began without any or stepped over them, began where their tokens say. From
        one on that changes the data they begin now, because nothing of its data has been read.
        """
        begun = list(self.begun[: number + 1])
        new = stages[len(begun) : number + 1]
        other_data = False
        for stage in new:
            other_data |= stage.number > 0 and stage.names("data")
            now = other_data or (stage.number == number and number > 0)
            begun.append((stage.name, progress.point if now else _point_at(stage.begin, progress, seq_len)))
        return StageRecord(tuple(begun), self.read, self.read if other_data else self.read_before)

    def after(self, data: DataNode, samples: int) -> StageRecord:
        """Return the record once this many samples of the current data have been read."""
        return dataclasses.replace(self, read=samples_read(data, samples, self.read_before))


def _point_at(tokens: int, progress: Progress, seq_len: int) -> ChangePoint:
    if not tokens or not progress.history.points:
        return BEGINNING.point
    found = {
        unit: round(progress.history.convert(tokens, Unit.TOKENS, unit, progress.point, seq_len))
        for unit in (Unit.STEPS, Unit.SAMPLES)
    }
    return ChangePoint(found[Unit.STEPS], found[Unit.SAMPLES], tokens, progress.batch)


@dataclass(frozen=True)
class Place:
    """A run's place among its stages.

    stages  all of the run
    number  of the current one
    record  with the current stage; None where the stage has not begun, which only checks before the start see
    """

    stages: tuple[Stage, ...]
    number: int
    record: StageRecord | None = None

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.stages[self.number]

    @property
    def is_last(self) -> bool:
        """True for the last stage."""
        return self.number == len(self.stages) - 1

    @property
    def is_over(self) -> bool:
        """True if the stage begins with its tokens read already, by a long step before it. The last stage never is."""
        return self.record is not None and not self.is_last and self.record.begun[-1][1].tokens >= self.stage.end

    def begun(self, record: StageRecord) -> Place:
        """Return the place once the stage has begun."""
        return dataclasses.replace(self, record=record)

    def first(self, group: str) -> Stage:
        """Return the stage from which on a group has its current values: the last one, up to this, that names it."""
        return next((stage for stage in reversed(self.stages[: self.number + 1]) if stage.names(group)), self.stages[0])

    def begins(self, group: str) -> bool:
        """Return whether the current stage gives a group other values than it had."""
        return self.number > 0 and self.stage.names(group)

    def origin(self, group: str) -> ChangePoint:
        """Return the run's counters where a group's current values began."""
        return BEGINNING.point if self.record is None else self.record.begun[self.first(group).number][1]

    def length(self, group: str) -> Duration:
        """Return how long a group keeps its current values: to the beginning of the next stage that names it, or the end."""
        following = (stage.begin for stage in self.stages[self.number + 1 :] if stage.names(group))
        end = next(following, self.stages[-1].end)
        begin = self.first(group).begin if self.record is None else self.origin(group).tokens
        return Duration(max(1, end - begin), Unit.TOKENS)


def stage_at(stages: Sequence[Stage], tokens: int) -> int:
    """Return the number of the stage that a run of this many tokens is in; behind the last one's end, the last."""
    return next((stage.number for stage in stages if tokens < stage.end), len(stages) - 1)
