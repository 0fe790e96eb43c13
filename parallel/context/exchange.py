"""Point-to-point messages between members of rings, all over one group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Members:
    """The members of rings: their global ranks in order, and a group that contains them."""

    ranks: Sequence[int]
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Message:
    """A tensor and the member that it is sent to or received from. An empty one is not sent."""

    tensor: torch.Tensor
    member: int


class Exchange:
    """Messages under way. All members post theirs in the same order, so that sends and receives match."""

    def __init__(self, members: Members, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self._kept = [*sends, *receives]  # their memory must live until they have arrived
        operations = [
            dist.P2POp(operation, message.tensor, members.ranks[message.member], members.group)
            for operation, messages in ((dist.isend, sends), (dist.irecv, receives))
            for message in messages
            if message.tensor.numel()
        ]
        self._works: list[Any] = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        """Wait until the messages have arrived; on a GPU only the stream waits."""
        for work in self._works:
            work.wait()
