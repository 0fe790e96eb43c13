"""Go back to an earlier checkpoint, in the same processes: which one, and what the journal says of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ...checkpoint.files import open_files
from ...checkpoint.folder import list_steps, step_name, step_of
from ...checkpoint.restore import holds_checkpoint, read_manifest
from ..derived import checkpoint_folder
from ..find_checkpoint import saved_progress
from ..resolve import ResolvedRun
from ..stages.record import StageRecord
from .guard import RewindNeeded, TrainingDiverged
from .journal import Journal, Rewind, read_journal


@dataclass(frozen=True)
class WayBack:
    """The point at which a rewound run goes on. It is all that rank 0 has to send: the config's nodes may not be picklable.

    checkpoint  to resume from
    record      of the stages begun there; None for a run without stages
    journal     with this rewind as its last
    """

    checkpoint: Path | str
    record: StageRecord | None
    journal: Journal

    def apply(self, run: ResolvedRun) -> ResolvedRun:
        """Return the run that goes on from there."""
        place = run.place if run.place is None or self.record is None else run.place.begun(self.record)
        return replace(run, checkpoint=self.checkpoint, place=place)


def find_way_back(run: ResolvedRun, needed: RewindNeeded) -> WayBack:
    """Return the earlier checkpoint that a run goes on from.

    It is the newest in memory or on the disk; where the run went back to that one before, the next older one, since the cause
    may lie before it.

    Raises TrainingDiverged where there is none, or the run went back from there `trainer.bad_step_limit` times.
    """
    folder = checkpoint_folder(run.config)
    if not holds_checkpoint(folder):
        raise TrainingDiverged(f"{needed.reason}. Nothing is saved yet that the run could go back to")
    journal = Journal(needed.data)
    journal.add(read_journal(folder))
    newest = read_manifest(folder)
    on_disk = (step_of(name) for name in list_steps(open_files(folder)).names)
    older = sorted((step for step in on_disk if step is not None and step < newest.step), reverse=True)
    tried = {each.to for each in journal.rewinds if not each.copies and not each.in_place}
    steps = [newest.step, *older]
    to = next((step for step in steps if step not in tried), steps[-1])
    if sum(each.step > to for each in journal.rewinds) >= run.config.trainer.bad_step_limit:
        times = "the run went back from there as often as trainer.bad_step_limit allows"
        raise TrainingDiverged(f"{needed.reason}. It does not go back to step {to} again: {times}")
    journal.rewinds.append(Rewind(needed.step, to, needed.ranges, needed.reason, needed.data, copies=needed.copies))
    checkpoint: Path | str = folder if to == newest.step else f"{folder.rstrip('/')}/{step_name(to)}"
    if run.place is None:
        return WayBack(checkpoint, None, journal)
    state = newest.state if to == newest.step else read_manifest(checkpoint).state
    progress = saved_progress(state)
    if progress.tokens < run.place.stage.begin:
        raise TrainingDiverged(
            f"{needed.reason}. The newest checkpoint is of an earlier stage; resume from it by resume=<path>"
        )
    record = StageRecord.from_state(state).at(run.place.stages, run.place.number, progress, run.config.data.seq_len)
    return WayBack(checkpoint, record, journal)
