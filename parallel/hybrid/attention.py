"""Attention of a row whose first documents are shared with other ranks: around a ring of each one's own ranks."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist

from ...kernels.attention_blocks import Kernel
from ...kernels.documents import Documents
from ..context.blocks import RingExchange
from ..context.exchange import measure_waiting
from ..context.ring import Ring, ring_attend
from ..mesh import Mesh


class HybridAttention:
    """Causal attention inside documents, whole or shared. Implements `kernels.attention.Attend`."""

    def __init__(self, mesh: Mesh, ring_direct: int, ring_exchange: RingExchange = "keys", kernel: Kernel = "cudnn") -> None:
        """Every data rank makes one at the same time: the first message needs all of them.

        ring_direct: `parallel.ring_direct`; ring_exchange: `parallel.ring_exchange`
        """
        group = mesh.group("data")
        self._kernel: Kernel = kernel
        self._ring = Ring(tuple(dist.get_process_group_ranks(group)), mesh.data_rank, group, ring_direct, ring_exchange)
        mesh.before_closing.append(measure_waiting(group, mesh.compute_time.ring_waiting))
        mesh.sum(torch.zeros((), device=mesh.device), "data")

    def __call__(
        self,
        q_BTHD: torch.Tensor,
        k_BTKD: torch.Tensor,
        v_BTKD: torch.Tensor,
        documents: Documents | None = None,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to earlier positions of the same document, wherever they are. Returns (B, T, H, D)."""
        return ring_attend(
            q_BTHD,
            k_BTKD,
            v_BTKD,
            documents,
            length=None,
            ring=self._ring,
            kernel=self._kernel,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )

    def with_kernel(self, kernel: Kernel) -> HybridAttention:
        """Return the same, computing with this kernel."""
        other = copy.copy(self)
        other._kernel = kernel
        return other
