"""Ring attention: exact causal attention over sequences that are spread over several ranks, with point-to-point messages.

Every member starts with its own keys. In step t it computes on the keys of the member t places before it, while those of
step t + 1 are being received, and merges the results by log-sum-exp (`moving_keys.py`). Classic ring attention (arXiv
2310.01889) passes whole key blocks from neighbour to neighbour. Here the holder sends directly to the member that needs the
keys, and only the span that it uses: three quarters of the volume under a causal mask, and almost nothing in packed rows of
short documents. In the backward pass the keys are sent again, and their gradients go directly back to the holder, which sums
them in fp32. In wide rings neighbours do hand keys on, and spans that nobody further on uses are left out (`hand_on.py`).

Or queries move, and outputs come back (`moving_queries.py`, after TokenRing, arXiv 2412.20501). With as many heads of keys as
of queries that sends less (`traffic.py`); with grouped-query attention keys are smaller.

The members are a plain list of ranks, given with each call: no process group is made per set of ranks. All messages go over
one group that contains them.

Shape legend: B rows, T positions held by this member, H query heads, K key/value heads, D head dim; kv: keys and values
stacked, (2, B, t, K, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ...kernels.attention_op import register_backward
from ...kernels.documents import Documents
from ...kernels.sinks import add_sinks, sinks_gradient
from .blocks import RingExchange
from .moving_keys import keys_backward, keys_forward
from .moving_queries import queries_backward, queries_forward
from .ring_call import RingCall, on_device, own_cu_seqlens
from .ring_plan import DIRECT, plan_documents


@dataclass(frozen=True)
class Ring:
    """The members that share sequences: their global ranks in order, this process's index among them, and a group for messages.

    direct: the most members that send keys directly; more than that hand them on from neighbour to neighbour.
    ring_exchange: what is sent to the holder of the other side, `parallel.ring_exchange`. Queries are always sent directly.
    The group contains the members and maybe others. With NCCL its communicator must exist before the first call (one
    collective by all of the group), since not every member takes part in every exchange.
    """

    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup
    direct: int = DIRECT
    ring_exchange: RingExchange = "keys"


def ring_attend(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    documents: Documents | None = None,
    *,
    length: int | None,
    ring: Ring,
    kernel: str = "cudnn",
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention over rows of `length` positions of which this member holds its pieces (`deal_pieces`).

    length     None: this member's row has documents of its own, of which it shares the first with other members, each with
               some (`ring_plan.plan_rings`)
    documents  of the whole rows, the same on every member but for the part (`with_ring_part`); without a length, of this row
    kernel     what computes a member's blocks in half precision on a GPU (`attention_blocks.Kernel`)
    window, softcap, sinks  as in `kernels.attention.Attend`
    Every member must call it, in the same order as its other calls on the same members. Returns (B, T, H, D).
    """
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    part, rows = (None, None) if documents is None else (documents.part_cu_seqlens, documents.host_cu_seqlens)
    if length is None:
        assert documents is not None
        part, rows = documents.cu_seqlens, documents.host_rings
    assert documents is None or part is not None, "the documents do not know this member's part (`with_ring_part`)"
    where = (length, list(ring.ranks), ring.index, ring.direct, ring.ring_exchange, ring.group.group_name)
    window = None if window is None or (length is not None and window >= length) else window
    out_BTHD, _ = ring_forward(q_BTHD, k_BTKD, v_BTKD, part, rows, sinks, *where, scale, window, softcap, kernel)
    return out_BTHD


def with_ring_part(documents: Documents, size: int, index: int) -> Documents:
    """Add to the documents of whole rows where those of the part begin that member `index` of `size` holds."""
    device = documents.cu_seqlens.device
    plan = plan_documents(tuple(documents.host_cu_seqlens.tolist()), documents.ids_BS.shape[1], size, index)
    return documents._replace(part_cu_seqlens=on_device(own_cu_seqlens(plan.own), device))


# Operators of their own, so that `torch.compile` does not trace messages and selective activation checkpointing can keep
# the outputs by name instead of sending everything again.
@torch.library.custom_op("meshloom::ring_forward", mutates_args=())
def ring_forward(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    part_cu_seqlens: torch.Tensor | None,
    host_cu_seqlens: torch.Tensor | None,
    sinks_H: torch.Tensor | None,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ring_attend`'s output and the log-sum-exp of each row: (B, H, T), or (1, H, B·T) with documents."""
    call = RingCall.of(
        part_cu_seqlens, host_cu_seqlens, length, ranks, index, direct, ring_exchange, group, scale, window, softcap, kernel
    )
    q, k, v = map(call.rows, (q_BTHD, k_BTKD, v_BTKD))
    out, lse = (queries_forward if ring_exchange == "queries" else keys_forward)(q, k, v, call)
    if sinks_H is not None:
        out, lse = add_sinks(out, lse, sinks_H)
    return out.reshape(q_BTHD.shape).contiguous(), lse.contiguous()


@torch.library.custom_op("meshloom::ring_backward", mutates_args=())
def ring_backward(
    dout_BTHD: torch.Tensor,
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    out_BTHD: torch.Tensor,
    lse: torch.Tensor,
    part_cu_seqlens: torch.Tensor | None,
    host_cu_seqlens: torch.Tensor | None,
    sinks_H: torch.Tensor | None,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients (dq, dk, dv, dsinks) of `ring_forward`, each member's for its positions; dsinks may be empty."""
    call = RingCall.of(
        part_cu_seqlens, host_cu_seqlens, length, ranks, index, direct, ring_exchange, group, scale, window, softcap, kernel
    )
    dout, q, k, v, out = map(call.rows, (dout_BTHD.contiguous(), q_BTHD, k_BTKD, v_BTKD, out_BTHD))
    backward = queries_backward if ring_exchange == "queries" else keys_backward
    dq, dk, dv = backward(dout, q, k, v, out, lse, call)
    return (
        dq.to(q.dtype).reshape(q_BTHD.shape).contiguous(),
        dk.to(k.dtype).reshape(k_BTKD.shape).contiguous(),
        dv.to(v.dtype).reshape(v_BTKD.shape).contiguous(),
        lse.new_empty(0) if sinks_H is None else sinks_gradient(dout, out, lse, sinks_H),
    )


register_backward(ring_forward, ring_backward)
