"""Numbers that are still being computed on the device, read later without stopping it."""

from __future__ import annotations

import torch


class Deferred:
    """Device scalars on their way to the host: one asynchronous copy for all of them.

    `read()` waits for that copy alone, not for work queued behind it; a step later it has long arrived.
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
        """Name → number."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._host.tolist(), strict=True))
