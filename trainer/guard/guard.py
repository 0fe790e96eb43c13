"""The guard of a run's steps: what is done about a step whose loss or gradient is not finite, or a spike."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...checkpoint.restore import holds_checkpoint
from ...data.batch import GlobalBatch
from ...optim.progress import Progress
from ...parallel.engine import StepLoss
from ...parallel.mesh import Mesh
from ..all_ranks import from_main, on_main
from ..config import TrainerConfig
from ..watch.incidents import Incident, IncidentLog
from .journal import Journal, Rewind
from .replay import DEVICE, PASSING, WEIGHTS, Diagnosis, replay, replay_spike
from .spikes import LOSS_SPIKE, SpikeDetector, Verdict

if TYPE_CHECKING:
    from ..loop import Loop

log = logging.getLogger(__name__)

ACTIONS = {
    "skip": "The step is skipped (trainer.on_bad_step=skip)",
    "accept": "The step is skipped, as the last one before a new level",
    "redo": "The step is taken again, with the same weights",
    "leave out": "The step is taken again without these samples (trainer.on_bad_step=rewind)",
    "rewind": "The run goes back (trainer.on_bad_step=rewind)",
}
WHY_STOPPED = {
    "stop": "The run stops (trainer.on_bad_step=stop)",
    "limit": "The run stops, after as many bad steps in a row as trainer.bad_step_limit",
    "weights": "The run stops: no step can be taken with these weights",
    "device": "The run stops: every step on this device is in doubt. Start it again without it",
}
SETTLED = 64
"""Good steps in a row after which a bad one is no reason any more to keep an older checkpoint."""


class TrainingDiverged(RuntimeError):
    """The run can't go on: a step is bad, and nothing is left to be done about it."""


class RewindNeeded(Exception):
    """The run shall go on from an earlier checkpoint.

    step, reason  where, and why
    ranges        samples to leave out, as [first, end) pairs
    data          fingerprint of the data whose samples these are
    copies        of a weight that did not agree: see `Rewind`
    """

    def __init__(
        self,
        step: int,
        reason: str,
        data: str,
        ranges: Sequence[Sequence[int]] = (),
        copies: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(reason)
        self.step, self.reason, self.data, self.ranges, self.copies = step, reason, data, ranges, copies or {}


class StepGuard:
    """Judges steps on the device, and handles bad ones on the host, a step later and on all ranks alike.

    A skipped step moves the data and the schedule, and nothing else: not the weights, the optimizer's state and counts, the
    balance of experts, nor the batch controller.

    bad_steps  of the run, so far
    suspected  the first of the bad steps since the run was last in order; None: it is in order. Retention keeps the newest
               checkpoint before it
    """

    def __init__(self, mesh: Mesh, trainer: TrainerConfig, journal: Journal, folder: str, output_dir: Path) -> None:
        """journal: of the run's rewinds, which lies in `folder`, that of its checkpoints."""
        self._mesh, self.journal, self._folder = mesh, journal, folder
        self._mode, self._limit = trainer.on_bad_step, trainer.bad_step_limit
        self._detector = SpikeDetector(mesh, trainer.spike_sigmas)
        self._incidents = IncidentLog(output_dir)
        self.bad_steps = 0
        self.suspected: int | None = None
        self._in_a_row = self._good_in_a_row = 0
        self._redone: int | None = None
        self._judged_batch = self._seen_batch = 0  # the largest of the level, on the device and on the host

    @property
    def skip(self) -> torch.Tensor:
        """1 on the device if the step just judged, or one before it that the host has not seen, is bad."""
        return self._detector.skip

    def judge(self, loss: StepLoss, norm: torch.Tensor, batch: int) -> dict[str, torch.Tensor]:
        """Judge a step of so many samples before its update: sets `skip`. Return numbers for the host."""
        if falls(self._judged_batch, batch):
            self._detector.restart_window()
            self._judged_batch = 0
        self._judged_batch = max(self._judged_batch, batch)
        own = loss.mean if loss.own is None else loss.own
        return self._detector.judge(loss.mean, norm, own)

    def _see(self, batch: int) -> None:
        """Begin the statistic anew on the host where the device has."""
        if falls(self._seen_batch, batch):
            self._detector.restart_mirror()
            self._seen_batch = 0
        self._seen_batch = max(self._seen_batch, batch)

    def accept(self, verdict: Verdict, progress: Progress) -> None:
        """Note a good step. progress: after it"""
        self._see(progress.batch)
        self._detector.accept(verdict)
        self._in_a_row = 0
        # Before the suspected step, to which the run is on its way again, nothing has been put in order yet.
        self._good_in_a_row = self._good_in_a_row + 1 if self.suspected is None or progress.step > self.suspected else 0
        if self.suspected is not None and self._good_in_a_row >= SETTLED:
            self.suspected = None

    def handle(self, loop: Loop, progress: Progress, verdict: Verdict, *, by_worker: bool = False) -> bool:
        """Handle a bad step, which the device has skipped with all that followed. Return whether to take it again.

        It is taken again after a passing fault, and without the samples that a rewind leaves out: the weights are still those
        before it. Called on all ranks. progress: after the step; by_worker: whether it was dealt so

        Raises TrainingDiverged or RewindNeeded where the run can't go on with these weights.
        """
        step, batch = progress.step, GlobalBatch(progress.samples - progress.batch, progress.batch)
        self._see(progress.batch)
        self.bad_steps += 1
        self._in_a_row += 1
        self._good_in_a_row = 0
        if self.suspected is None:
            self.suspected = step
        if verdict.finite:
            diagnosis = replay_spike(loop, batch, verdict.loss, verdict.norm, by_worker=by_worker)
        else:
            diagnosis = replay(loop, batch, by_worker=by_worker)
        message = describe(verdict, step, batch, diagnosis)
        action = self._choose(step, verdict, diagnosis)
        self._note(message, step, batch, verdict, diagnosis, action)
        ranges = [[each, each + 1] for each in diagnosis.samples] or [[batch.first, batch.first + batch.count]]
        if action in WHY_STOPPED:
            raise TrainingDiverged(f"{message}. {WHY_STOPPED[action]}; the weights are those before the step")
        if action == "rewind":
            raise RewindNeeded(step, message, self.journal.data, () if diagnosis.kind == WEIGHTS else ranges)
        if action == "leave out":
            self.leave_out(Rewind(step, step - 1, ranges, message, self.journal.data, in_place=True))
        if action == "accept":
            self._accept_new_level(step)
        self._detector.release()
        if self._mesh.is_main:
            log.warning("%s. %s", message, ACTIONS[action])
        return action in ("redo", "leave out")

    def _choose(self, step: int, verdict: Verdict, diagnosis: Diagnosis) -> str:
        """Return what to do about a bad step: a key of ACTIONS or of WHY_STOPPED."""
        if self._mode == "stop":
            return "stop"
        if diagnosis.kind == DEVICE:
            return "device"
        if diagnosis.kind == WEIGHTS:
            return "rewind" if self._mode == "rewind" else "weights"
        if verdict.finite and max(self._in_a_row, self._spikes_before(step) + 1) >= self._limit:
            return "accept"
        if self._in_a_row >= self._limit:
            return "limit"
        if diagnosis.kind == PASSING and step != self._redone:
            self._redone = step
            return "redo"
        if self._mode == "skip":
            return "skip"
        # The weights are still those before the step: without a checkpoint it is as good to go on from them.
        return "rewind" if verdict.finite and self._something_is_saved() else "leave out"

    def _spikes_before(self, step: int) -> int:
        """Return how many steps the run has left out shortly before this one. Other samples spike, too: it is the level."""
        own = (each for each in self.journal.rewinds if each.data == self.journal.data and each.ranges)
        return len({each.step for each in own if step - 2 * self._limit <= each.step < step})

    def _something_is_saved(self) -> bool:
        return from_main(self._mesh, lambda: holds_checkpoint(self._folder))

    def suspect_rewound(self, step: int) -> None:
        """Keep suspecting the step from which the run went back to this one or an earlier."""
        ahead = [each.step for each in self.journal.rewinds if each.step > step]
        if ahead:
            self.suspected = min([*ahead, *([] if self.suspected is None else [self.suspected])])
            self._good_in_a_row = 0

    def leave_out(self, rewind: Rewind) -> None:
        """Add a rewind to the journal, and write that before the run meets the samples again. Raises on all ranks."""
        self.journal.rewinds.append(rewind)
        on_main(self._mesh, lambda: self.journal.write(self._folder))

    def _accept_new_level(self, step: int) -> None:
        """Begin the statistic anew: so many finite steps in a row are no outliers."""
        self._detector.restart()
        message = f"step {step}: {self._limit} spikes in a row (trainer.bad_step_limit) are taken for a new level from here on"
        self._in_a_row = 0
        if self._mesh.is_main:
            log.warning("%s", message)
            self._incidents.write(Incident("new_level", message, step))

    def _note(self, message: str, step: int, batch: GlobalBatch, verdict: Verdict, diagnosis: Diagnosis, action: str) -> None:
        if not self._mesh.is_main:
            return
        own = verdict.rank if self._mesh.layout.pp == 1 else None  # a pipeline's loss is its last stage's, whoever spoilt it
        rank = diagnosis.ranks[0] if len(diagnosis.ranks) == 1 else own
        details: dict[str, Any] = {
            "loss": verdict.loss,
            "grad_norm": verdict.norm,
            "samples_of_step": [batch.first, batch.first + batch.count],
            "action": action,
            "cause": diagnosis.kind,
            "samples": diagnosis.samples,
            "found": [[t.rank, t.pass_, t.layer, t.number] for t in diagnosis.traces],
        }
        self._incidents.write(Incident("bad_step", message, step, rank=rank, host=None, details=details))

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values, as far as the host knows it. It waits for no device."""
        counts = {"bad_steps": self.bad_steps, "suspected": self.suspected, "batch": self._seen_batch}
        return {**self._detector.state_dict(), **counts, "in_a_row": self._in_a_row, "good_in_a_row": self._good_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._detector.load_state_dict(state)
        self.bad_steps, self.suspected = state["bad_steps"], state["suspected"]
        self._in_a_row, self._good_in_a_row = state["in_a_row"], state["good_in_a_row"]
        self._judged_batch = self._seen_batch = state.get("batch", 0)


def falls(largest: int, batch: int) -> bool:
    """Return whether a batch is so small, beside the largest of the level, that gradients are much noisier: half or less."""
    return 2 * batch <= largest


def describe(verdict: Verdict, step: int, batch: GlobalBatch, diagnosis: Diagnosis) -> str:
    """Return what is known of a bad step, in one line without its full stop."""
    what = f"step {step}: loss {verdict.loss:.6g}, gradient norm {verdict.norm:.6g}"
    if verdict.finite:
        name, sigmas = ("loss", verdict.loss_sigmas) if verdict.code & LOSS_SPIKE else ("gradient norm", verdict.norm_sigmas)
        what += f": the {name} is {sigmas:.1f} sigmas above the steps before (trainer.spike_sigmas)"
    elif verdict.rank is not None:
        what += f"; the loss of rank {verdict.rank} is not finite"
    elif verdict.bad_ranks:
        what += f"; the losses of {verdict.bad_ranks} ranks are not finite"
    elif not math.isfinite(verdict.norm) and math.isfinite(verdict.loss):
        what += "; the backward pass is at fault"
    return f"{what}; {diagnosis.describe()} (samples {batch.first} to {batch.first + batch.count - 1})"
