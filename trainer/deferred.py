"""Scalars that are copied from the device asynchronously, and read later without stopping it."""

from __future__ import annotations

import torch


class _Copy:
    """A tensor on its way to the host.

    `read()` waits for that copy only, not for work queued after it. A step later the copy has long finished.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tensor

    def read(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host


class Deferred:
    """Device scalars that one asynchronous copy brings to the host."""

    def __init__(self, scalars: dict[str, torch.Tensor], vector: torch.Tensor | None = None) -> None:
        """vector: (N,) float64, numbers without names that are copied with them."""
        self._names = list(scalars)
        stacked = torch.stack([scalar.detach().double().reshape(()) for scalar in scalars.values()])
        self._copy = _Copy(stacked if vector is None else torch.cat([stacked, vector]))

    def read(self) -> dict[str, float]:
        """Return name → number."""
        return dict(zip(self._names, self._copy.read()[: len(self._names)].tolist(), strict=True))

    def read_vector(self) -> list[float]:
        """Return the numbers without names."""
        return self._copy.read()[len(self._names) :].tolist()


class DeferredIntegers:
    """A vector of integers that an asynchronous copy brings to the host, bit by bit."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._copy = _Copy(numbers.detach())

    def read(self) -> list[int]:
        """Return the numbers."""
        return self._copy.read().tolist()
