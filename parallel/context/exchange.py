"""Point-to-point messages between members of rings, all over one group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

Waiting = Callable[[], AbstractContextManager[None]]
"""Makes a context around waiting for messages, which measures it."""

_WAITING: dict[str, Waiting] = {}  # by the name of the group: an operator takes no objects, and finds its group so, too


def measure_waiting(group: dist.ProcessGroup, waiting: Waiting) -> Callable[[], object]:
    """Measure how long messages of a group are waited for, from now on. Returns what ends that."""
    _WAITING[group.group_name] = waiting
    return lambda: _WAITING.pop(group.group_name, None)


@dataclass(frozen=True)
class Members:
    """The members of rings: their global ranks in order, and a group that contains them."""

    ranks: Sequence[int]
    group: dist.ProcessGroup

    @property
    def waiting(self) -> Waiting:
        """Makes a context that measures how long this process waits for their messages."""
        return _WAITING.get(self.group.group_name, nullcontext)


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
        self._waiting = members.waiting

    def wait(self) -> None:
        """Wait until the messages have arrived; on a GPU only the stream waits."""
        if self._works:
            with self._waiting():
                for work in self._works:
                    work.wait()
