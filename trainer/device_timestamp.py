"""Timestamps on the device, to measure how long steps take."""

from __future__ import annotations

import time

import torch


class DeviceTimestamp:
    """The time at which the work queued so far is done: a CUDA event on the stream, or the host's clock on a CPU.

    The host runs ahead of a GPU by up to a step, and catches up when it evaluates. So host times would not measure a step;
    between two device timestamps lies one step's work, whatever the host did meanwhile. Recording one does not synchronize.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._seconds = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._seconds = time.perf_counter()

    def seconds_since(self, earlier: DeviceTimestamp) -> float:
        """Return the seconds since an earlier timestamp of the same device. Waits until the device has reached this one."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000
