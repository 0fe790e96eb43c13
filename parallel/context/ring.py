"""Ring attention: exact causal attention over sequences that are spread over several ranks, with point-to-point messages.

Every member starts with its own keys. In step t it computes on the keys of the member t places before it, while those of
step t + 1 are being received, and merges the results by log-sum-exp. Classic ring attention (arXiv 2310.01889) passes whole key
blocks from neighbour to neighbour. Here the holder sends directly to the member that needs the keys, and only the span that it
uses: three quarters of the volume under a causal mask, and almost nothing in packed rows of short documents. In the backward
pass the keys are sent again, and their gradients go directly back to the holder, which sums them in fp32. In wide rings
neighbours do hand keys on, and spans that nobody further on uses are left out (`hand_on.py`). With grouped-query attention keys
are smaller than queries, which TokenRing (arXiv 2412.20501) sends.

The members are a plain list of ranks, given with each call: no process group is made per set of ranks. All messages go over
one group that contains them.

Shape legend: B rows, T positions held by this member, H query heads, K key/value heads, D head dim; KV: keys and values
stacked, (2, B, t, K, D).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group

from ...kernels.attention_blocks import Segments, block_backward, block_forward, segments_backward, segments_forward
from ...kernels.attention_op import register_backward
from ...kernels.documents import Documents
from ...kernels.sinks import add_sinks, sinks_gradient
from .blocks import AttentionBlock
from .exchange import Exchange, Members, Message
from .ring_plan import DIRECT, RingPlan, plan_documents, plan_rings, plan_whole
from .steps import Receive, Step


@dataclass(frozen=True)
class Ring:
    """The members that share sequences: their global ranks in order, this process's index among them, and a group for messages.

    direct: the most members that send keys directly; more than that hand them on from neighbour to neighbour.
    The group contains the members and maybe others. With NCCL its communicator must exist before the first call (one
    collective by all of the group), since not every member takes part in every exchange.
    """

    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup
    direct: int = DIRECT


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
    where = (length, list(ring.ranks), ring.index, ring.direct, ring.group.group_name)
    window = None if window is None or (length is not None and window >= length) else window
    out_BTHD, _ = ring_forward(q_BTHD, k_BTKD, v_BTKD, part, rows, sinks, *where, scale, window, softcap, kernel)
    return out_BTHD


def with_ring_part(documents: Documents, size: int, index: int) -> Documents:
    """Add to the documents of whole rows where those of the part begin that member `index` of `size` holds."""
    device = documents.cu_seqlens.device
    plan = plan_documents(tuple(documents.host_cu_seqlens.tolist()), documents.ids_BS.shape[1], size, index)
    return documents._replace(part_cu_seqlens=on_device(_part_of(plan.own), device))


def _part_of(own: tuple[int, ...]) -> torch.Tensor:
    """Return, on the host, the bounds of a member's own sequences within its part (like `cu_seqlens`)."""
    return torch.tensor([0, *accumulate(own)], dtype=torch.int32)


def on_device(on_host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a device without waiting for it."""
    return (on_host.pin_memory() if device.type == "cuda" else on_host).to(device, non_blocking=True)


@lru_cache(maxsize=16)
def _windowed_segments(own: tuple[int, ...], device: torch.device) -> Segments:
    """Return a member's own sequences where a window takes its parts apart: every layer of a micro-batch asks for the same."""
    on_host = _part_of(own)
    return Segments(on_device(on_host, device), on_host)


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
    group: str,
    scale: float,
    window: int | None,
    softcap: float | None,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ring_attend`'s output and the log-sum-exp of each row: (B, H, T), or (1, H, B·T) with documents."""
    call = _Call.of(part_cu_seqlens, host_cu_seqlens, length, ranks, index, direct, group, scale, window, softcap, kernel)
    q, k, v = map(call.rows, (q_BTHD, k_BTKD, v_BTKD))
    out, lse = _forward(q, k, v, call)
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
    group: str,
    scale: float,
    window: int | None,
    softcap: float | None,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients (dq, dk, dv, dsinks) of `ring_forward`, each member's for its positions; dsinks may be empty."""
    call = _Call.of(part_cu_seqlens, host_cu_seqlens, length, ranks, index, direct, group, scale, window, softcap, kernel)
    dout, q, k, v, out = map(call.rows, (dout_BTHD.contiguous(), q_BTHD, k_BTKD, v_BTKD, out_BTHD))
    dq, dk, dv = _backward(dout, q, k, v, out, lse, call)
    return (
        dq.to(q.dtype).reshape(q_BTHD.shape).contiguous(),
        dk.to(k.dtype).reshape(k_BTKD.shape).contiguous(),
        dv.to(v.dtype).reshape(v_BTKD.shape).contiguous(),
        lse.new_empty(0) if sinks_H is None else sinks_gradient(dout, out, lse, sinks_H),
    )


@dataclass(frozen=True)
class _Call:
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
        group: str,
        scale: float,
        window: int | None,
        softcap: float | None,
        kernel: str,
    ) -> _Call:
        segments = None
        if part_cu_seqlens is None or host_cu_seqlens is None:
            assert length is not None
            plan = plan_whole(length, len(ranks), index, window, direct)
        else:
            if length is None:
                plan = plan_rings(tuple(host_cu_seqlens.tolist()), index, window, direct)
            else:
                plan = plan_documents(tuple(host_cu_seqlens.tolist()), length, len(ranks), index, window, direct)
            if window is None:
                segments = Segments(part_cu_seqlens, _part_of(plan.own))
            else:
                segments = _windowed_segments(plan.own, part_cu_seqlens.device)
        found = _resolve_process_group(group)  # pyright: ignore[reportArgumentType]
        how = {"scale": scale, "softcap": softcap, "kernel": kernel}
        return cls(plan, segments, Members(ranks, found), None if window is None else window - 1, how)

    def rows(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        """With documents the rows are laid end to end into one, as the plan counts."""
        return x_BTHD if self.segments is None else x_BTHD.reshape(1, -1, *x_BTHD.shape[2:])

    @property
    def merges(self) -> bool:
        """True if blocks are merged into what this member has found on its own sequences."""
        return bool(self.plan.own_blocks) or any(step.receives for step in self.plan.steps)

    @property
    def adds_to_keys(self) -> bool:
        """True if other blocks' gradients of keys are added to those of this member's own sequences."""
        return bool(self.plan.own_blocks) or any(each.keys for step in self.plan.steps for each in step.returns)

    def own_spans(self) -> list[slice]:
        """List where the sequences of whole rows lie on this member."""
        ends = list(accumulate(self.plan.own, initial=0))
        return [slice(start, stop) for start, stop in pairwise(ends)]


def _rounds(k: torch.Tensor, v: torch.Tensor, call: _Call) -> Iterator[tuple[Step | None, list[torch.Tensor]]]:
    """Yield (None, []) for the member's own keys, then each step of the plan with the messages that arrived for it.

    While the caller computes on a step's keys, those of the next are under way.
    """
    step: Step | None = None
    arrived: list[torch.Tensor] = []
    for coming in (*call.plan.steps, None):
        sends, receives = _messages_of_keys(coming, k, v, arrived)
        exchange = Exchange(call.members, sends, receives)
        yield step, arrived
        exchange.wait()
        step, arrived = coming, [message.tensor for message in receives]


def _messages_of_keys(
    step: Step | None, k: torch.Tensor, v: torch.Tensor, arrived: Sequence[torch.Tensor]
) -> tuple[list[Message], list[Message]]:
    """Return the messages to send in a step, and buffers for those to receive; none after the last step.

    arrived: the messages of the step before, parts of which are handed on
    """
    if step is None:
        return [], []
    sends: list[Message] = []
    for send in step.sends:
        if send.received is None:
            kv_spans = [torch.stack((k[:, start:stop], v[:, start:stop])) for start, stop in send.keys]
        else:
            kv_spans = [arrived[send.received][:, :, start:stop] for start, stop in send.keys]
        kv = kv_spans[0] if len(kv_spans) == 1 else torch.cat(kv_spans, dim=2)
        sends.append(Message(kv.contiguous(), send.member))
    return sends, [Message(_receive_buffer(k, each.length), each.member) for each in step.receives]


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = q, q  # the first round replaces them
    for step, arrived in _rounds(k, v, call):
        if step is None:
            out, lse = _own_forward(q, k, v, call)
            if call.merges:
                out = out.to(lse.dtype)
            met = [(call.plan.own_blocks, k, v)]
        else:
            met = [(each.blocks, kv[0], kv[1]) for each, kv in zip(step.receives, arrived, strict=True)]
        for blocks, keys_met, values_met in met:
            for block in blocks:
                queries, keys = slice(*block.queries), slice(*block.keys)
                tensors = (q[:, queries], keys_met[:, keys], values_met[:, keys])
                found = block_forward(*tensors, causal=False, left=block.left, **call.how)
                _merge(out[:, queries], lse[:, :, queries], *found)
    return out.to(q.dtype), lse


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: _Call,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute gradients as `_forward` does outputs; a step's key gradients are sent to their holder during the next step."""
    dq, dk, dv = q, k, v  # the first round replaces them
    pending: _KeyGradients | None = None
    for step, arrived in _rounds(k, v, call):
        if step is None:
            dq, dk, dv = _own_backward(dout, q, k, v, out, lse, call)
            if call.merges:
                dq = dq.to(lse.dtype)
            if call.adds_to_keys:
                dk, dv = dk.to(lse.dtype), dv.to(lse.dtype)
            _blocks_backward(call.plan.own_blocks, (dout, q, k, v, out, lse), (dq, dk, dv), call)
            continue
        found: list[torch.Tensor] = []
        for each, kv in zip(step.receives, arrived, strict=True):
            # In the sum's dtype where several blocks see a key, or several members: each would be rounded.
            seen_often = sum(block.keys[1] - block.keys[0] for block in each.blocks) > each.length
            summed = seen_often or each.gradient is not None
            dkv = torch.zeros_like(kv, dtype=lse.dtype if summed else kv.dtype)
            _blocks_backward(each.blocks, (dout, q, kv[0], kv[1], out, lse), (dq, dkv[0], dkv[1]), call)
            found.append(dkv)
        travelling = {} if pending is None else pending.collect(dk, dv)
        messages = [
            _gradient_message(each, dkv, travelling.get(number), k.dtype)
            for number, (each, dkv) in enumerate(zip(step.receives, found, strict=True))
        ]
        pending = _KeyGradients(call, step, messages, k, lse.dtype)
    if pending is not None:
        pending.collect(dk, dv)
    return dq, dk, dv


def _gradient_message(each: Receive, dkv: torch.Tensor, travelling: torch.Tensor | None, dtype: torch.dtype) -> Message:
    """Return the gradient of received keys for their holder, or with what travels around with them for the next member.

    travelling: the sum of the members before; None: there is none before this one. dtype: of keys
    """
    if each.gradient is None:
        return Message(dkv.to(dtype), each.member)
    if travelling is None:
        travelling = _receive_buffer(dkv[0], each.gradient.length).zero_()
    at = 0
    for start, stop in each.gradient.keys:
        travelling[:, :, start:stop] += dkv[:, :, at : at + stop - start]
        at += stop - start
    return Message(travelling, each.gradient.to)


def _blocks_backward(
    blocks: Sequence[AttentionBlock],
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    call: _Call,
) -> None:
    """Add the gradients of blocks to those of queries, keys and values.

    tensors: dout, q, the keys and values met, out and lse; sums: of dq, dk and dv, shaped as q, keys and values.
    """
    (dout, q, k, v, out, lse), (dq, dk, dv) = tensors, sums
    for block in blocks:
        queries, keys = slice(*block.queries), slice(*block.keys)
        dq_part, dk_part, dv_part = block_backward(
            *(dout[:, queries], q[:, queries], k[:, keys], v[:, keys], out[:, queries], lse[:, :, queries]),
            causal=False,
            left=block.left,
            **call.how,
        )
        dq[:, queries] += dq_part
        dk[:, keys] += dk_part
        dv[:, keys] += dv_part


class _KeyGradients:
    """Gradients of keys on their way to the members that hold the keys; those of this member's own keys are received."""

    def __init__(self, call: _Call, step: Step, found: Sequence[Message], k: torch.Tensor, summed: torch.dtype) -> None:
        """summed: dtype of gradients that travel around a ring."""
        self._returns = step.returns
        self._arriving = [
            Message(_receive_buffer(k, each.length, summed if each.travels else k.dtype), each.member) for each in step.returns
        ]
        self._exchange = Exchange(call.members, found, self._arriving)

    def collect(self, dk: torch.Tensor, dv: torch.Tensor) -> dict[int, torch.Tensor]:
        """Wait for the gradients that arrive, and add those of this member's own keys to dk and dv.

        Returns the others: message of the next step → the gradient that travels with it.
        """
        self._exchange.wait()
        travelling: dict[int, torch.Tensor] = {}
        for each, message in zip(self._returns, self._arriving, strict=True):
            if each.onto is not None:
                travelling[each.onto] = message.tensor
            at = 0
            for start, stop in each.keys:
                dk[:, start:stop] += message.tensor[0][:, at : at + stop - start]
                dv[:, start:stop] += message.tensor[1][:, at : at + stop - start]
                at += stop - start
        return travelling


def _receive_buffer(k: torch.Tensor, length: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Allocate a message of keys and values to come, (2, B, length, K, D). dtype: None: that of keys."""
    return k.new_empty(2, k.shape[0], length, *k.shape[2:], dtype=dtype)


def _merge(out: torch.Tensor, lse: torch.Tensor, found_out: torch.Tensor, found_lse: torch.Tensor) -> None:
    """Take the attention to more keys into (out, lse), in place: out moves by the found keys' share of the softmax."""
    share_BHQ = torch.sigmoid(found_lse - lse)
    out.lerp_(found_out.to(out.dtype), share_BHQ.transpose(1, 2).unsqueeze(-1))
    torch.logaddexp(lse, found_lse, out=lse)


def _own_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    if q.shape[1] == 0:
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], 0, dtype=exact)
    if call.segments is not None:
        return segments_forward(q, k, v, call.segments, left=call.left, **call.how)
    spans = call.own_spans()
    found = [block_forward(q[:, at], k[:, at], v[:, at], causal=True, left=call.left, **call.how) for at in spans]
    if len(found) == 1:
        return found[0]
    return torch.cat([out for out, _ in found], dim=1), torch.cat([lse for _, lse in found], dim=2)


def _own_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: _Call,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if q.shape[1] == 0:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if call.segments is not None:
        return segments_backward(dout, q, k, v, out, lse, call.segments, left=call.left, **call.how)
    found = [
        block_backward(
            *(dout[:, at], q[:, at], k[:, at], v[:, at], out[:, at], lse[:, :, at]),
            causal=True,
            left=call.left,
            **call.how,
        )
        for at in call.own_spans()
    ]
    if len(found) == 1:
        return found[0]
    dq, dk, dv = (torch.cat([each[number] for each in found], dim=1) for number in range(3))
    return dq, dk, dv


register_backward(ring_forward, ring_backward)
