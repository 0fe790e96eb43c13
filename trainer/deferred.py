"""Scalars that are copied from the device asynchronously, and read later without stopping it."""

from __future__ import annotations

import torch


class Deferred:
    """Device scalars that one asynchronous copy brings to the host.

    `read()` waits for that copy only, not for work queued after it. A step later the copy has long finished.
    """

    def __init__(self, scalars: dict[str, torch.Tensor]) -> None:
        self._names = list(scalars)
        stacked = torch.stack([scalar.detach().double().reshape(()) for scalar in scalars.values()])
        self._event: torch.cuda.Event | None = None
        if stacked.is_cuda:
            self._host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            self._host.copy_(stacked, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = stacked

    def read(self) -> dict[str, float]:
        """Return name → number."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._host.tolist(), strict=True))
