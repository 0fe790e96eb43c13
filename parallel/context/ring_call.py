"""The context of one ring attention call: the plan, whom to send to, and how blocks are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch._C._distributed_c10d import _resolve_process_group

from ...kernels.attention_blocks import Segments
from .blocks import RingExchange
from .exchange import Members
from .ring_plan import RingPlan, plan_documents, plan_rings, plan_whole


@dataclass(frozen=True)
class RingCall:
    """The context of one ring attention call.

    segments  this member's own sequences; None for whole rows
    left      keys before its own that a query sees inside a sequence; None: all
    how       further arguments of the kernels
    """

    plan: RingPlan
    segments: Segments | None
    members: Members
    left: int | None
    how: dict[str, Any]

    @classmethod
    def of(
        cls,
        part_cu_seqlens: torch.Tensor | None,
        host_cu_seqlens: torch.Tensor | None,
        length: int | None,
        ranks: Sequence[int],
        index: int,
        direct: int,
        ring_exchange: str,
        group: str,
        scale: float,
        window: int | None,
        softcap: float | None,
        kernel: str,
    ) -> RingCall:
        """Plan a call from the arguments of `ring.ring_forward`."""
        side, segments = cast("RingExchange", ring_exchange), None
        if part_cu_seqlens is None or host_cu_seqlens is None:
            assert length is not None
            plan = plan_whole(length, len(ranks), index, window, direct, side)
        else:
            if length is None:
                plan = plan_rings(tuple(host_cu_seqlens.tolist()), index, window, direct, side)
            else:
                plan = plan_documents(tuple(host_cu_seqlens.tolist()), length, len(ranks), index, window, direct, side)
            if window is None:
                segments = Segments(part_cu_seqlens, own_cu_seqlens(plan.own))
            else:
                segments = _windowed_segments(plan.own, part_cu_seqlens.device)
        found = _resolve_process_group(group)  # pyright: ignore[reportArgumentType]
        how = {"scale": scale, "softcap": softcap, "kernel": kernel}
        return cls(plan, segments, Members(ranks, found), None if window is None else window - 1, how)

    def rows(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        """With documents the rows are laid end to end into one, as the plan counts."""
        return x_BTHD if self.segments is None else x_BTHD.reshape(1, -1, *x_BTHD.shape[2:])

    def own_spans(self) -> list[slice]:
        """List where the sequences of whole rows lie on this member."""
        ends = list(accumulate(self.plan.own, initial=0))
        return [slice(start, stop) for start, stop in pairwise(ends)]


def own_cu_seqlens(own: tuple[int, ...]) -> torch.Tensor:
    """Return, on the host, the bounds of a member's own sequences within its part (like `cu_seqlens`)."""
    return torch.tensor([0, *accumulate(own)], dtype=torch.int32)


def on_device(on_host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a device without waiting for it."""
    return (on_host.pin_memory() if device.type == "cuda" else on_host).to(device, non_blocking=True)


@lru_cache(maxsize=16)
def _windowed_segments(own: tuple[int, ...], device: torch.device) -> Segments:
    """Return a member's own sequences where a window takes its parts apart: every layer of a micro-batch asks for the same."""
    on_host = own_cu_seqlens(own)
    return Segments(on_device(on_host, device), on_host)
