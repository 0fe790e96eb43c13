"""Ring attention in which queries move to the keys that they see, and results come back (TokenRing, arXiv 2412.20501).

A member computes on the queries of a step while those of the next are under way. Its outputs with their log-sum-exps go back
during the next step, and the holder of the queries merges them. In the backward pass queries move with the output's gradient,
log-sum-exp and delta. Gradients of queries come back; those of keys are sums of what this member computes itself.

Instead of the output its products with the gradient are sent, one number a row (`attention_delta.py`). With whole outputs a
backward pass would send as much as one that moves keys of as many heads.

Shape legend: see `ring.py`; t: positions of a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...kernels.attention_blocks import block_forward
from ...kernels.attention_delta import output_with_delta, row_products
from .blocks import Positions
from .exchange import Exchange, Message
from .ring_blocks import add_blocks, add_gradients_of_blocks, merge, own_backward, own_forward
from .ring_call import RingCall
from .steps import Receive, Step

BTHD, BHT = -3, -1
"""Dim of positions of queries and what is shaped as they are, and of log-sum-exps and delta."""

Moving = Sequence[tuple[Sequence[torch.Tensor], int]]
"""Messages of a member: the tensors that are stacked in each, and their dim of positions."""


def queries_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: RingCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output (B, T, H, D) and the log-sum-exp (B, H, T) of this member's queries."""
    out, lse = q, q  # the first round replaces them
    pending: _Results | None = None
    for step, arrived in _rounds([((q,), BTHD)], call):
        if step is None:
            out, lse = own_forward(q, k, v, call)
            if call.plan.own_blocks or call.plan.returns:
                out = out.to(lse.dtype)
            add_blocks(call.plan.own_blocks, (q, k, v), (out, lse), call)
            continue
        found = [_outputs(each, queries[0], k, v, call) for each, (queries,) in zip(step.receives, arrived, strict=True)]
        _merge_results(pending, out, lse)
        pending = _Results(call, step, found, [(q, BTHD), (lse, BHT)])
    _merge_results(pending, out, lse)
    return out.to(q.dtype), lse


def queries_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: RingCall,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients (dq, dk, dv) at this member's positions."""
    dq, dk, dv = q, k, v  # the first round replaces them
    delta = row_products(dout, out, lse.dtype) if call.plan.returns else lse  # nothing is sent where nothing returns
    pending: _Results | None = None
    for step, arrived in _rounds([((q, dout), BTHD), ((lse, delta), BHT)], call):
        if step is None:
            dq, dk, dv = own_backward(dout, q, k, v, out, lse, call)
            if call.plan.own_blocks or call.plan.returns:
                dq = dq.to(lse.dtype)
            if call.plan.own_blocks or call.plan.receives:
                dk, dv = dk.to(lse.dtype), dv.to(lse.dtype)
            add_gradients_of_blocks(call.plan.own_blocks, (dout, q, k, v, out, lse), (dq, dk, dv), call)
            continue
        found: list[list[torch.Tensor]] = []
        for each, ((q_met, dout_met), (lse_met, delta_met)) in zip(step.receives, arrived, strict=True):
            dq_met = torch.zeros_like(q_met)  # a query is in two blocks at most: their sum is rounded once in any type
            tensors = (dout_met, q_met, k, v, output_with_delta(dout_met, delta_met), lse_met)
            add_gradients_of_blocks(each.blocks, tensors, (dq_met, dk, dv), call)
            found.append([dq_met])
        _add_results(pending, dq)
        pending = _Results(call, step, found, [(q, BTHD)])
    _add_results(pending, dq)
    return dq, dk, dv


def _rounds(moving: Moving, call: RingCall) -> Iterator[tuple[Step | None, list[list[torch.Tensor]]]]:
    """Yield (None, []) for the member's own queries, then each step of the plan with what arrived for it.

    While the caller computes on a step's queries, those of the next are under way.
    """
    step: Step | None = None
    arrived: list[list[torch.Tensor]] = []
    for coming in (*call.plan.steps, None):
        sends: list[Message] = []
        receives: list[list[Message]] = []
        if coming is not None:
            sends = [Message(_packed(*each, send.spans), send.member) for send in coming.sends for each in moving]
            receives = [[Message(_buffer(*each, to.length), to.member) for each in moving] for to in coming.receives]
        exchange = Exchange(call.members, sends, [message for each in receives for message in each])
        yield step, arrived
        exchange.wait()
        step, arrived = coming, [[message.tensor for message in each] for each in receives]


def _packed(tensors: Sequence[torch.Tensor], dim: int, spans: Sequence[Positions]) -> torch.Tensor:
    """Stack these spans of tensors' positions, one behind the other."""
    parts = [[x.narrow(dim, start, stop - start) for start, stop in spans] for x in tensors]
    return torch.stack([each[0] if len(each) == 1 else torch.cat(each, dim) for each in parts])


def _buffer(tensors: Sequence[torch.Tensor], dim: int, length: int) -> torch.Tensor:
    """Allocate a message to come, of so many positions."""
    shape = list(tensors[0].shape)
    shape[dim] = length
    return tensors[0].new_empty(len(tensors), *shape)


def _outputs(each: Receive, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: RingCall) -> list[torch.Tensor]:
    """Attend with a message's queries to keys of this member: the output (B, t, H, D) and the log-sum-exp (B, H, t)."""
    if len(each.blocks) == 1:
        (block,) = each.blocks
        keys = slice(*block.keys)
        found = block_forward(q, k[:, keys], v[:, keys], causal=False, left=block.left, **call.how)
        return [x.contiguous() for x in found]
    exact = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q, dtype=exact)
    lse = out.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    add_blocks(each.blocks, (q, k, v), (out, lse), call)
    return [out.to(q.dtype), lse]


class _Results:
    """Results on their way to the members that hold the queries; those of this member's own queries are received."""

    def __init__(
        self, call: RingCall, step: Step, found: Sequence[Sequence[torch.Tensor]], like: Sequence[tuple[torch.Tensor, int]]
    ) -> None:
        """Post them. like: of each tensor of a result one of all positions of a member, and its dim of positions."""
        self._returns, self._dims = step.returns, [dim for _, dim in like]
        self._arriving = [[_buffer((x,), dim, each.length)[0] for x, dim in like] for each in step.returns]
        sends = [Message(x, to.member) for to, result in zip(step.receives, found, strict=True) for x in result]
        receives = [Message(x, each.member) for each, result in zip(step.returns, self._arriving, strict=True) for x in result]
        self._exchange = Exchange(call.members, sends, receives)

    def collect(self) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """Wait for them, and yield each span of this member's positions with its part of the results."""
        self._exchange.wait()
        for each, result in zip(self._returns, self._arriving, strict=True):
            at = 0
            for start, stop in each.spans:
                length = stop - start
                yield slice(start, stop), [x.narrow(dim, at, length) for x, dim in zip(result, self._dims, strict=True)]
                at += length


def _merge_results(pending: _Results | None, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Merge outputs that come back into those of this member, in place."""
    if pending is not None:
        for at, (out_found, lse_found) in pending.collect():
            merge(out[:, at], lse[:, :, at], out_found, lse_found)


def _add_results(pending: _Results | None, dq: torch.Tensor) -> None:
    """Add gradients that come back to those of this member's queries, in place."""
    if pending is not None:
        for at, (dq_found,) in pending.collect():
            dq[:, at] += dq_found
