"""Activation checkpointing: what the forward pass keeps for backward (`trainer.activation`, `trainer.activation_budget`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..kernels.attention_op import attend
from ..kernels.experts.logits import router_logits
from ..kernels.experts.operators import experts_up
from ..kernels.flash4 import flash4_attend
from ..models.mixture.mixture import makes_choices, sends_tokens
from ..models.mixture.routing import choose_active, choose_experts
from .context.ring import ring_forward
from .kept_results import Keeps, keeping
from .on_host import BlockingCopies, Copies, on_host
from .policies import POLICIES

Timer = Callable[[], AbstractContextManager[None]]
"""Makes a context that measures what is done in it."""

_ATTENTION = {
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    attend._opoverload,
    flash4_attend._opoverload,
    ring_forward._opoverload,
}
_CHOICES = {choose_experts._opoverload, choose_active._opoverload}
_EXPERTS = {*_CHOICES, experts_up._opoverload, router_logits._opoverload}
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, router_logits._opoverload)
_PRODUCTS_KEPT = 5
"""The first of the matrix products of a block that does not say how many (`products_kept`): Llama's q, k, v, attention's output
and the gate. The next one's output is recomputed, and the backward pass does not read the last one's."""


def _selection(products_kept: int) -> Keeps:
    """Keep attention and the first matrix products of a pass over a block."""
    products = 0

    def keeps(operation: Any) -> bool:
        nonlocal products
        # A router's kernel takes the place of its product: otherwise a product of shared experts would be kept in its stead.
        products += operation in _PRODUCTS
        if operation in _ATTENTION or operation in _EXPERTS:
            return True
        return operation in _PRODUCTS and products <= products_kept

    return keeps


def _choices() -> Keeps:
    """Keep the choice of experts: chosen again, a token's experts might be others."""
    return lambda operation: operation in _CHOICES


def _contexts(make: Callable[[], Keeps], *, compiled: bool) -> Callable[[], Any]:
    """Make a checkpoint's `context_fn`. compiled: whether a compiler traces it, which knows torch's own."""
    if not compiled:
        return functools.partial(keeping, make)

    def contexts() -> Any:
        passes = {False: make(), True: make()}  # the first pass, and the one that computes it again

        def policy(context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
            kept = passes[context.is_recompute](operation)
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    return contexts


def _checkpointed(forward: Callable[..., Any], keep: Callable[[], Any] | None) -> Callable[..., Any]:
    """Wrap `forward` so that all but its input is recomputed. keep: makes the contexts of what is kept besides.

    The wrapper is our own function because the compiler starts at the first frame outside torch. It would silently skip a
    partial of `checkpoint`, and everything inside it.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if keep is not None:
            return checkpoint(forward, *args, use_reentrant=False, context_fn=keep, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _timed(forward: Callable[..., Any], timer: Timer) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with timer():
            return forward(*args, **kwargs)

    return run


def apply_policies(
    blocks: Sequence[nn.Module],
    policies: Sequence[str],
    *,
    compiled: bool = False,
    hidden: Sequence[Callable[[], Copies | None]] = (),
    timed: Sequence[Timer | None] = (),
) -> None:
    """Make each block keep what its policy says, and compile it where asked to, before it is sharded.

    The blocks' `forward` is replaced, so parameter names stay as they are.

    none       keep every intermediate result
    selective  keep attention and all but two of the matrix products, compute the rest again; of a mixture keep logits, choice,
               and what the backward pass of experts reads that kernels compute
    full       keep only the block's input, and the choice of experts
    offload    keep everything, in host memory

    hidden: begins a pass over each block under policy "none" whose results may go to the host (`on_host.RowOffload`)
    timed: measures the forward passes of each block; None: they are not measured

    Checkpointing is inside of what is compiled, so that the compiler sees what is computed again and fuses it; copies to
    the host are outside, because it can't see them. Around a tensor-parallel block, policy "full" is outside too: the
    compiler would save its mesh as if that were a tensor, and fail. There the block's last product is computed again as well.
    The same holds around tokens that travel to other ranks, where the compiler pauses: it can't inside of a checkpoint.
    """
    for number, (block, policy) in enumerate(zip(blocks, policies, strict=True)):
        assert policy in POLICIES, policy
        outside = sends_tokens(block) or any(isinstance(weight, DTensor) for weight in block.parameters())
        selection = functools.partial(_selection, getattr(block, "products_kept", _PRODUCTS_KEPT))
        keeps = selection if policy == "selective" else _choices if makes_choices(block) else None
        outside = outside and policy == "full" and compiled
        contexts = None if keeps is None else _contexts(keeps, compiled=compiled and not outside)
        if outside:
            block.forward = _checkpointed(torch.compile(block.forward), contexts)
            continue
        if policy in ("selective", "full"):
            block.forward = _checkpointed(block.forward, contexts)
        timer = timed[number] if timed else None
        begin = BlockingCopies if policy == "offload" else hidden[number] if hidden and policy == "none" else None
        if begin is not None:
            block.forward = on_host(block, torch.compile(block.forward) if compiled else block.forward, begin)
        elif compiled and timer is None:
            block.compile()
        elif compiled:
            block.forward = torch.compile(block.forward)
        if timer is not None:  # outside of what is compiled
            block.forward = _timed(block.forward, timer)
