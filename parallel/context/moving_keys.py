"""Ring attention in which keys move to the queries that see them, and gradients of keys come back.

While a member computes on the keys of a step, those of the next are under way. In the backward pass keys are sent again, and a
step's gradients go to their holders during the next step. They are summed in fp32 (fp64 for fp64 inputs).

Shape legend: see `ring.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .exchange import Exchange, Message
from .ring_blocks import add_blocks, add_gradients_of_blocks, own_backward, own_forward
from .ring_call import RingCall
from .steps import Receive, Step


def keys_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: RingCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output (B, T, H, D) and the log-sum-exp (B, H, T) of this member's queries."""
    out, lse = q, q  # the first round replaces them
    for step, arrived in _rounds(k, v, call):
        if step is None:
            out, lse = own_forward(q, k, v, call)
            if call.plan.own_blocks or call.plan.receives:
                out = out.to(lse.dtype)
            add_blocks(call.plan.own_blocks, (q, k, v), (out, lse), call)
            continue
        for each, kv in zip(step.receives, arrived, strict=True):
            add_blocks(each.blocks, (q, kv[0], kv[1]), (out, lse), call)
    return out.to(q.dtype), lse


def keys_backward(
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
    pending: _KeyGradients | None = None
    for step, arrived in _rounds(k, v, call):
        if step is None:
            dq, dk, dv = own_backward(dout, q, k, v, out, lse, call)
            if call.plan.own_blocks or call.plan.receives:
                dq = dq.to(lse.dtype)
            if call.plan.own_blocks or call.plan.returns:
                dk, dv = dk.to(lse.dtype), dv.to(lse.dtype)
            add_gradients_of_blocks(call.plan.own_blocks, (dout, q, k, v, out, lse), (dq, dk, dv), call)
            continue
        found: list[torch.Tensor] = []
        for each, kv in zip(step.receives, arrived, strict=True):
            # In the sum's dtype where several blocks see a key, or several members: each would be rounded.
            seen_often = sum(block.keys[1] - block.keys[0] for block in each.blocks) > each.length
            summed = seen_often or each.gradient is not None
            dkv = torch.zeros_like(kv, dtype=lse.dtype if summed else kv.dtype)
            add_gradients_of_blocks(each.blocks, (dout, q, kv[0], kv[1], out, lse), (dq, dkv[0], dkv[1]), call)
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


class _KeyGradients:
    """Gradients of keys on their way to the members that hold the keys; those of this member's own keys are received."""

    def __init__(self, call: RingCall, step: Step, found: Sequence[Message], k: torch.Tensor, summed: torch.dtype) -> None:
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
            for start, stop in each.spans:
                dk[:, start:stop] += message.tensor[0][:, at : at + stop - start]
                dv[:, start:stop] += message.tensor[1][:, at : at + stop - start]
                at += stop - start
        return travelling


def _receive_buffer(k: torch.Tensor, length: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Allocate a message of keys and values to come, (2, B, length, K, D). dtype: None: that of keys."""
    return k.new_empty(2, k.shape[0], length, *k.shape[2:], dtype=dtype)


def _rounds(k: torch.Tensor, v: torch.Tensor, call: RingCall) -> Iterator[tuple[Step | None, list[torch.Tensor]]]:
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
            kv_spans = [torch.stack((k[:, start:stop], v[:, start:stop])) for start, stop in send.spans]
        else:
            kv_spans = [arrived[send.received][:, :, start:stop] for start, stop in send.spans]
        kv = kv_spans[0] if len(kv_spans) == 1 else torch.cat(kv_spans, dim=2)
        sends.append(Message(kv.contiguous(), send.member))
    return sends, [Message(_receive_buffer(k, each.length), each.member) for each in step.receives]
