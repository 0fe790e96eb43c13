"""The training step and the loop around it.

A step in order: the controller chooses the batch size → the data order gives the global batch → this rank's share of it →
the engine accumulates gradients → clip → update → counters → hooks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.assignment import Share
from ..data.batch import GlobalBatch
from ..data.loader import Loader
from ..kernels.gpu_peaks import peak_flops
from ..optim.batch.controller import Controller
from ..optim.batch.statistics import GradientStatistics
from ..optim.horizon import Horizon
from ..optim.progress import Progress
from ..optim.schedules.coupling import Coupling
from ..optim.schedules.schedule import Schedule
from ..parallel.compute_time import StepWork
from ..parallel.engine import Engine
from ..parallel.gradient_noise import Measure, Moments
from ..parallel.heartbeat import Phase
from ..parallel.mesh import Mesh
from .all_ranks import PeerFailed, raise_on_all_ranks
from .deferred import Deferred
from .device_timestamp import DeviceTimestamp
from .guard.guard import StepGuard, TrainingDiverged
from .guard.island_statistics import IslandStatistics
from .guard.spikes import Verdict
from .hooks.base import Hook
from .signals import StopRequest
from .stages.written import Stage

log = logging.getLogger(__name__)

WORK_NUMBERS = len(StepWork._fields)


class PlansDiffer(RuntimeError):
    """Processes have planned a step's documents in different ways."""


def agree_on_plan(mesh: Mesh, share: Share, what: str) -> None:
    """Raise PlansDiffer, on all ranks and before their first message, where ranks have planned in other ways.

    what: the batch of which it is the share, as the message begins
    """
    if share.checksum is None:
        return
    codes = mesh.codes(share.checksum)
    usual = max(codes, key=codes.count)
    others = [rank for rank, code in enumerate(codes) if code != usual]
    if others:
        raise PlansDiffer(
            f"{what}: rank {', '.join(map(str, others))} deals the batch's documents in another way than"
            " the other ranks (parallel.hdp): give all of them the same data files and the same version of Meshloom"
        )


@dataclass
class Pending:
    """A finished step whose numbers are still on the device.

    start      the progress at its beginning, and `progress` that at its end
    tokens     of its global batch, padding included
    began      when the numbers of the step before were computed
    done       when its own were
    moments    the gradient statistics that it measured, if any; their values are among the numbers
    flops      of the model on the global batch
    planned    numbers of the plan by which it was dealt
    learned    whether it had a loss, and so an update
    by_worker  whether documents were dealt by worker: a replay must deal them so again
    """

    start: Progress
    progress: Progress
    lr: float
    tokens: int
    began: DeviceTimestamp
    done: DeviceTimestamp
    numbers: Deferred
    moments: Moments | None
    flops: float
    planned: Mapping[str, float]
    learned: bool
    by_worker: bool


@dataclass
class Loop:
    """A run in progress. `build.py` builds its parts; the counters are the only state of its own.

    Under local updating it is one island's: steps are taken by the island's processes alone, and so are its numbers. Islands
    have the same counters, of all their samples and tokens, and what ends the run ends it for all.

    island_statistics  those of the guard, of each island; None: the processes are one
    guard     judges its steps; None: a number that is not finite ends the run
    horizon   of the whole run
    stage     the stage that it trains, of a run that has some
    work      the work of each rank in the step before that of the newest metrics, by rank
    """

    mesh: Mesh
    engine: Engine
    batches: Loader
    controller: Controller
    schedule: Schedule
    coupling: Coupling
    horizon: Horizon
    flops_per_token: float
    output_dir: Path
    max_grad_norm: float | None = None
    hooks: Sequence[Hook] = ()
    guard: StepGuard | None = None
    island_statistics: IslandStatistics | None = None
    stage: Stage | None = None
    progress: Progress = field(default_factory=Progress)
    stopping: bool = False
    work: list[StepWork] = field(default_factory=list[StepWork])
    _pending: list[Pending] = field(default_factory=list)
    _began: DeviceTimestamp = field(init=False)
    _work: torch.Tensor | None = None
    _stop_here: bool = False
    _delivered: bool = False
    _peak: float | None = None
    _last_loss: float = math.nan
    _last_statistics: GradientStatistics | None = None
    _last_bad: bool = False

    def __post_init__(self) -> None:
        self.restart_clock()  # `step` may be called without `run`
        if self.mesh.device.type == "cuda":
            name = torch.cuda.get_device_name(self.mesh.device)
            self._peak = peak_flops(name)
            if self._peak is None:
                log.warning("no mfu is reported: the peak of '%s' is not in kernels/gpu_peaks.py", name)

    def run(self, stop: StopRequest, accept: Callable[[], None] = lambda: None) -> bool:
        """Train to the end of the run or of its stage, or until a stop is requested on any rank. Return whether it was reached.

        accept: called once no hook has refused the run, on all ranks
        """
        for hook in self.hooks:
            if not hook.alone:
                hook.on_run_begin(self)
        raise_on_all_ranks(self.mesh, lambda: [hook.on_run_begin(self) for hook in self.hooks if hook.alone])
        accept()
        raise_on_all_ranks(self.mesh, lambda: [hook.on_run_accepted(self) for hook in self.hooks])
        self.restart_clock()
        self.mesh.heartbeat.beat(Phase.HOOKS)
        while not self.finished and not self.stopping:
            counts = self.step(stop.requested)
            self.mesh.heartbeat.beat(Phase.HOOKS)
            after = self.progress
            for hook in self.hooks if counts else ():
                hook.on_step_end(self)
                if self.progress is not after:  # it has read the step's numbers, and the step is taken again
                    break
            if self.finished or self.stopping:
                self.deliver_metrics(keep=0)  # the last step may have to be taken again
        return self.finished

    @property
    def island(self) -> Mesh:
        """The processes that take the steps: all, or under local updating those of the island."""
        return self.mesh.island

    @property
    def finished(self) -> bool:
        """True once the run has reached its horizon, or the end of its stage."""
        if self.stage is not None and self.progress.tokens >= self.stage.end:
            return True
        return self.at_end

    @property
    def at_end(self) -> bool:
        """True once the run has reached its horizon."""
        return self.horizon.position(self.progress, self.horizon.unit) >= self.horizon.total

    def step(self, stop_requested: bool = False) -> bool:
        """Update the weights once, from one global batch.

        Return False if the step does not count, because one before it has turned out to be bad.
        """
        start = self.progress
        heartbeat = self.mesh.heartbeat
        heartbeat.begin_step(start.step + 1)
        for hook in self.hooks:
            hook.on_step_begin(self)
        count = self.controller.next_batch(self.progress)
        before = self.progress.before(count, self.horizon.seq_len)
        share, measure = self._load(before, count)
        agree_on_plan(self.mesh, share, f"step {before.step + 1}")
        heartbeat.beat(Phase.EXCHANGE)
        tokens, signals = self.sum_over_ranks(share.valid_tokens, stop_requested)
        if not share.valid_tokens and not tokens:  # only a rank without targets waits here to hear whether others have any
            return self._pass_over(start, before, count, share, signals)

        loss = self.engine.accumulate(share, tokens, measure)
        norm = self.engine.gradient_norm()
        moments = None if measure is Measure.NOTHING else self.engine.gradient_moments(count)
        scalars = {"loss": loss.mean, "grad_norm": norm, **signals, **loss.extras}
        if self.guard is not None:
            scalars |= self.guard.judge(loss, norm, count)
        # Copied before the update, so that a controller that needs them does not wait for it.
        numbers = Deferred(scalars if moments is None else {**scalars, **moments.scalars}, self._work)
        done = DeviceTimestamp(self.mesh.device)
        if self.max_grad_norm is not None:
            self.engine.clip(self.max_grad_norm, norm)
        heartbeat.beat(Phase.HOOKS)
        for hook in self.hooks:
            hook.before_update(self)
        heartbeat.beat(Phase.UPDATE)
        lr = self.schedule.lr(before) * self.coupling.factor(before, self.controller.noise_scale)
        skip = None if self.guard is None else self.guard.skip
        self.engine.update(lr, skip)
        self.engine.zero_grad()

        self.progress = before.after(count, count * self.horizon.seq_len)
        heartbeat.beat(Phase.EXCHANGE)
        counts = self._record(start, lr, done, numbers, moments, share)
        return counts and self._join_islands(tokens, scalars["loss"], skip)

    def _join_islands(self, tokens: torch.Tensor, loss: torch.Tensor, skip: torch.Tensor | None = None) -> bool:
        """Exchange with other islands what is due after the step just recorded. Return whether the step counts.

        tokens, loss: of the island's part of the step's batch; skip: 1 on the device if it has not learned from them
        """
        islands, after = self.engine.islands, self.progress
        if islands is None:
            return True
        islands.count(after.step, tokens if skip is None else tokens * (1 - skip), loss)
        if islands.due(after.step, last=self.finished):
            if not self.deliver_metrics(keep=0):  # what others see must be good, and can't be taken back
                return False
            self.island.heartbeat.beat(Phase.OUTER)
            self.stopping |= islands.exchange(after.step, stop=self._stop_here, last=self.finished)
        return True

    def _load(self, before: Progress, count: int) -> tuple[Share, Measure]:
        """Load the coming step's share of the global batch, dealt so that what the controller needs of it can be measured."""
        measure = self._measure(before)
        following = self._measure(before.after(count, count * self.horizon.seq_len))
        dealt = {"by_worker": measure is not Measure.NOTHING, "next_by_worker": following is not Measure.NOTHING}
        return self.batches.load(GlobalBatch(before.samples, count), self.controller.micro_at(count), **dealt), measure

    def _measure(self, before: Progress) -> Measure:
        """Return the gradient statistics that the controller needs of the coming step."""
        if not self.controller.measures(before):
            return Measure.NOTHING
        return Measure.PROJECTIONS if self.controller.needs_projections else Measure.SQUARES

    def _pass_over(self, start: Progress, before: Progress, count: int, share: Share, signals: dict[str, torch.Tensor]) -> bool:
        """Count a global batch without any target as a step. Its loss is 0, its gradient is none, and nothing is updated."""
        if self.island.is_main:
            log.warning("step %d: no position of the global batch has a target, so nothing is updated", before.step + 1)
        zero = torch.zeros((), device=self.mesh.device)
        self.engine.forget_assignments()  # those of the step before are none of this one's
        if self.engine.islands is not None:  # an outer step may follow, which changes the weights
            for hook in self.hooks:
                hook.before_update(self)
        self.progress = before.after(count, count * self.horizon.seq_len)
        numbers = Deferred({"loss": zero, "grad_norm": zero, **signals}, self._work)
        counts = self._record(start, 0.0, DeviceTimestamp(self.mesh.device), numbers, None, share, learned=False)
        return counts and self._join_islands(zero, zero)

    def sum_over_ranks(self, valid_tokens: int, stop_requested: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum over all ranks of the island, in one collective: valid tokens of the batch, signals to end the run, and work.

        The signals count the ranks on which a stop was requested, and those on which a hook has a fault. All ranks of a data
        rank (its pipeline, context and tensor peers) count the same tokens; the sum is divided by them. Work is the numbers of
        `StepWork` of each rank's newest step; they go to the host with the step's numbers.
        """
        island, layout, device = self.island, self.island.layout, self.island.device
        work = [0.0] * (WORK_NUMBERS * layout.world_size)
        work[island.rank * WORK_NUMBERS : (island.rank + 1) * WORK_NUMBERS] = island.compute_time.newest()
        counts = [valid_tokens, stop_requested, self._fault is not None, *work]
        # From pinned memory: a copy to a GPU from pageable memory waits for all work queued before it.
        counted = torch.tensor(counts, dtype=torch.float64, pin_memory=device.type == "cuda")
        sums = island.sum(counted.to(device, non_blocking=True))
        self._work = sums[3:]
        return sums[0] / (layout.pp * layout.cp * layout.tp), {"stops": sums[1], "faults": sums[2]}

    @property
    def _fault(self) -> Exception | None:
        """Return the fault that keeps this rank from going on."""
        return next((hook.fault for hook in self.hooks if hook.fault is not None), None)

    def _record(
        self,
        start: Progress,
        lr: float,
        done: DeviceTimestamp,
        numbers: Deferred,
        moments: Moments | None,
        share: Share,
        *,
        learned: bool = True,
    ) -> bool:
        """Queue the step just done, and hand the numbers of the step before, which have arrived, to the hooks.

        The host waits for the newest numbers only after a run's first step, or if the controller needs them.

        learned: whether the step has a loss, for a controller to observe

        Return whether the step counts: see `step`.
        """
        after = self.progress
        tokens = self.progress.batch * self.horizon.seq_len
        # By convention a sample counts as one document where nobody has counted its own.
        flops = self.flops_per_token * tokens if share.flops is None else share.flops
        by_worker = share.worker_rows is not None
        self._pending.append(
            Pending(start, after, lr, tokens, self._began, done, numbers, moments, flops, share.numbers, learned, by_worker)
        )
        self._began = done
        must_know = learned and (self.controller.needs_loss or moments is not None)
        counts = self.deliver_metrics(keep=0 if must_know or not self._delivered else 1)  # users wait for the first
        if must_know and counts and not self._last_bad:
            self.controller.observe(self._last_statistics, self._last_loss, self.progress)
        return counts

    def restart_clock(self) -> None:
        """Exclude the time since the last step (of an evaluation, for example) from the next step's seconds."""
        self._began = DeviceTimestamp(self.mesh.device)

    @property
    def all_delivered(self) -> bool:
        """True if the hooks have the numbers of every step so far. As a rule those of the newest are still on their way."""
        return not self._pending

    def deliver_metrics(self, keep: int) -> bool:
        """Hand the numbers of finished steps to the hooks, except the newest `keep`, which may still be computing.

        Return whether the newest step counts. Otherwise `progress` has gone back, and that step is taken again.
        Raises what the guard does about a bad step or, without a guard, TrainingDiverged on all ranks for a loss or gradient
        norm that is not finite. Where a hook of some rank has a fault, that rank raises it, and the others raise PeerFailed.
        """
        newest = self.progress
        while len(self._pending) > keep:
            step = self._pending.pop(0)
            self._delivered = True
            progress, numbers = step.progress, step.numbers.read()
            phase = self.mesh.heartbeat.phase
            self.mesh.heartbeat.beat(Phase.HOOKS)  # nobody knows how long a hook, or a replay of the guard, takes
            work = step.numbers.read_vector()
            self.work = [StepWork(*work[at : at + WORK_NUMBERS]) for at in range(0, len(work), WORK_NUMBERS)]
            seconds = step.done.seconds_since(step.began)
            self._stop_here |= numbers.pop("stops") > 0
            self.stopping |= self._stop_here and self.engine.islands is None  # islands stop where they agree to
            self._last_loss = numbers["loss"]
            self._last_statistics = None
            if step.moments is not None:
                self._last_statistics = step.moments.statistics(numbers)
                numbers = {name: number for name, number in numbers.items() if name not in step.moments.scalars}
            verdict = Verdict.taken_from(numbers)
            self._last_bad = verdict is not None and verdict.bad
            if verdict is not None and self._repeats(step, verdict):
                return False
            if verdict is None and not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
                raise TrainingDiverged(f"step {progress.step}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}")
            if numbers.pop("faults") > 0:
                raise self._fault or PeerFailed(config_error=False)
            row: dict[str, Any] = {
                "step": progress.step,
                "loss": numbers.pop("loss"),
                "lr": step.lr,
                "grad_norm": numbers.pop("grad_norm"),
                "tokens": progress.tokens,
                "samples": progress.samples,
                "batch_samples": progress.batch,
                "step_seconds": seconds,
                "tokens_per_second": step.tokens / seconds,
                **numbers,
                **step.planned,
                **(self._last_statistics.metrics() if self._last_statistics is not None else {}),
                **self._device_numbers(step.flops / seconds),
            }
            if self.guard is not None and self.guard.bad_steps:
                row |= {"skipped": int(self._last_bad), "bad_steps": self.guard.bad_steps}
            if self.stage is not None:
                row["stage"] = self.stage.name
            if self.engine.islands is not None:
                row |= self.engine.islands.numbers()
            for hook in self.hooks:
                hook.on_metrics(self, row)
            self.mesh.heartbeat.beat(phase)
        return self.progress is newest

    def _repeats(self, step: Pending, verdict: Verdict) -> bool:
        """Take in the guard's verdict on a step. Return whether the step must be taken again, and so is not reported.

        The device has skipped what followed a bad step. That is taken again in any case.
        """
        assert self.guard is not None
        if not verdict.bad:
            self.guard.accept(verdict, step.progress)
            return False
        skipped = [step, *self._pending]
        self._pending.clear()
        self.engine.forget_updates(sum(each.learned for each in skipped))
        self.progress = step.progress
        repeats = self.guard.handle(self, step.progress, verdict, by_worker=step.by_worker)
        if repeats:
            self.progress = step.start
            for hook in self.hooks:
                hook.on_repeat(self, step.progress.step)
        self.restart_clock()
        return repeats

    def _device_numbers(self, flops_per_second: float) -> dict[str, float]:
        """Return peak memory, and model FLOPs utilisation where the GPU's peak is known; nothing on a CPU."""
        if self.mesh.device.type != "cuda":
            return {}
        numbers = {
            "memory_gib": torch.cuda.max_memory_allocated(self.mesh.device) / 2**30,
            "memory_reserved_gib": torch.cuda.max_memory_reserved(self.mesh.device) / 2**30,
        }
        if self._peak:
            numbers["mfu"] = flops_per_second / (self._peak * self.mesh.layout.world_size)
        return numbers
