"""Try third-party kernels before a run relies on them: they may fail in any way."""

from __future__ import annotations

from collections.abc import Callable

import torch


def hopper_reason(kernel: str, device: torch.device, error: Callable[[torch.device], float], tolerance: float) -> str | None:
    """Return why a kernel for Hopper GPUs can't be used on a device; None if it can.

    error: imports, compiles and tries it, and returns how far it is off; more than `tolerance` is wrong.
    Raises RuntimeError where the trial has left the GPU unusable.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "it needs a Hopper GPU"
    try:
        worst = error(device)
    except Exception as problem:  # not installed, or not for this Python, PyTorch or driver
        survived(kernel, problem, device)
        return f"{type(problem).__name__}: {problem}"
    return None if worst < tolerance else f"it is wrong by {worst:.1g}"


def survived(kernel: str, error: Exception, device: torch.device) -> None:
    """Raise RuntimeError if an error in a trial has broken the GPU for this process, as an access out of bounds does."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as broken:
        raise RuntimeError(f"trying {kernel} has left the GPU unusable for this process: {error}") from broken
