"""What the forward pass keeps for the backward pass (`trainer.activation`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..models.attention import attend_documents
from .ring import ring_forward

POLICIES = ("none", "selective", "full", "offload")

# The results of these are dear to compute and cheap to keep; everything else is computed again.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    attend_documents._opoverload,
    ring_forward._opoverload,
}


def _keep_dear(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _offloaded(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return forward(*args, **kwargs)

    return run


def apply_policy(blocks: list[nn.Module], policy: str) -> None:
    """Make each block keep what the policy says. The block's `forward` is replaced, so parameter names stay as they are.

    none       keep every intermediate result
    selective  keep matrix products and attention, compute the rest again
    full       keep only the block's input
    offload    keep everything, in host memory
    """
    assert policy in POLICIES, policy
    for block in blocks:
        if policy == "full":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        elif policy == "selective":
            contexts = functools.partial(create_selective_checkpoint_contexts, _keep_dear)
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
        elif policy == "offload":
            block.forward = _offloaded(block.forward)
