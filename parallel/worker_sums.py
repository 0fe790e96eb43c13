"""Sum a worker's gradient over the ranks that each have a part of it. Each of them gets one piece of the sum.

Gradients are sent as all-to-all in the dtype that they have, and summed by the receiver in a wider one: a rank sends
(n − 1) / n of a gradient, and no sum is rounded to the dtype of the compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..kernels.rows import sum_rows
from .shards import chunk


@dataclass(frozen=True)
class WorkerRanks:
    """The ranks that share this rank's workers: `count` neighbours in a group, from `first` on. None of a group: one rank."""

    group: dist.ProcessGroup | None = None
    first: int = 0
    count: int = 1

    def start_sum(self, gradient: torch.Tensor, dtype: torch.dtype, *, nothing: bool = False) -> Callable[[], torch.Tensor]:
        """Start to sum a gradient over the ranks. Every rank of the group must call it, in the same order.

        Returns a call that waits, and returns this rank's piece of the sum, 1-D, in `dtype`. Pieces are as `shards.chunk` cuts
        the flat gradient. The gradient must not change before that call. nothing: it is 0 on all ranks that share workers with
        this one, and is not sent.
        """
        assert self.group is not None
        flat = gradient.reshape(-1)[: 0 if nothing else None]
        sends, receives = [0] * self.group.size(), [0] * self.group.size()
        size = len(self.piece_of(flat))
        for number in range(self.count):
            sends[self.first + number] = chunk(len(flat), self.count, number)[1]
            receives[self.first + number] = size
        received = flat.new_empty(self.count * size)
        work: Any = dist.all_to_all_single(received, flat, receives, sends, group=self.group, async_op=True)

        def wait() -> torch.Tensor:
            work.wait()
            return sum_rows(received.view(self.count, size), dtype)

        return wait

    def piece_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the piece of a flattened tensor that this rank gets of its sum."""
        assert self.group is not None
        start, size = chunk(tensor.numel(), self.count, self.group.rank() - self.first)
        return tensor.reshape(-1)[start : start + size]
