"""Profile one step: `trainer.profile_step`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import profile

from .base import Hook

if TYPE_CHECKING:
    from ..loop import Loop

log = logging.getLogger(__name__)


class ProfileStep(Hook):
    """Profiles one step of this process. Writes `step-N.txt`, its kernels by time, and `step-N.json.gz`, a trace.

    The trace opens in Perfetto or chrome://tracing. The step begins and ends with an idle device, so it takes a little longer
    than others. Only rank 0 profiles; its wait for other ranks shows in its collectives.
    """

    alone = True

    def __init__(self, step: int, folder: Path) -> None:
        self._step = step
        self._folder = folder
        self._profile: profile | None = None

    def on_run_begin(self, loop: Loop) -> None:
        """Log if the run resumes after the step."""
        if loop.progress.step >= self._step:
            log.info("trainer.profile_step=%d: the run resumes after it, so nothing is profiled", self._step)

    def on_step_begin(self, loop: Loop) -> None:
        """Start the profiler before the step."""
        if loop.progress.step + 1 == self._step:
            _synchronize(loop.mesh.device)
            self._profile = profile()
            self._profile.start()

    def on_step_end(self, loop: Loop) -> None:
        """Stop the profiler after the step, and write its table and trace."""
        if self._profile is None:
            return
        _synchronize(loop.mesh.device)
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        table = self._folder / f"step-{self._step}.txt"
        table.write_text(kernel_table(self._profile), encoding="utf-8")
        self._profile.export_chrome_trace(str(table.with_suffix(".json.gz")))
        log.info("the profile of step %d: %s", self._step, table)
        self._profile = None
        loop.restart_clock()

    def close(self) -> None:
        """Stop the profiler of a run that failed within the step."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernel_table(profiler: profile) -> str:
    """Return a table of the kernels on the device, or the CPU where there is none, longest first: milliseconds, calls, name."""
    averages: list[Any] = list(profiler.key_averages())
    rows = [row for row in averages if row.device_type != torch.autograd.DeviceType.CPU]
    if not rows:
        return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=-1)
    rows = [row for row in rows if row.self_device_time_total and not row.is_user_annotation]
    rows.sort(key=_microseconds, reverse=True)
    lines = [f"{_microseconds(row) / 1000:9.3f} {row.count:6d}  {row.key[:150]}" for row in rows]
    return "\n".join([f"{sum(map(_microseconds, rows)) / 1000:9.3f} ms of kernels", *lines]) + "\n"


def _microseconds(row: Any) -> float:
    return row.self_device_time_total
