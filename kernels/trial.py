"""Try third-party kernels before a run relies on them: they may fail in any way."""

from __future__ import annotations

import torch


def survived(kernel: str, error: Exception, device: torch.device) -> None:
    """Raise RuntimeError if an error in a trial has broken the GPU for this process, as an access out of bounds does."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as broken:
        raise RuntimeError(f"trying {kernel} has left the GPU unusable for this process: {error}") from broken
