"""What the forward pass keeps for the backward pass (`trainer.activation`, `trainer.activation_budget`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..models.attention import attend_documents
from .ring import ring_forward

POLICIES = ("none", "selective", "full", "offload")
LADDER = ("none", "selective", "full")
"""Policies that a budget mixes, from the one that keeps most to the one that computes most again."""

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
_SMALL = 1 << 16  # bytes: a smaller tensor is not worth a copy to the host


def _keep_dear(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def mixed_policies(layers: int, budget: float, kept: Mapping[str, float], ladder: Sequence[str] = LADDER) -> list[str]:
    """A policy for each block such that together they keep at most `budget` of what policy "none" keeps of all of them.

    kept: what a block keeps under each policy, in any unit. As few blocks as can be go down the ladder, one rung after the
    other: a rung's saving costs less computation per byte than the next one's. They are spread evenly over the layers.
    Raises ValueError if even the last rung keeps more than the budget.
    """
    limit = budget * layers * kept["none"]
    for higher, lower in pairwise(ladder):
        moved = max(0, math.ceil((layers * kept[higher] - limit) / (kept[higher] - kept[lower]) - 1e-9))
        if moved <= layers:
            return [lower if (at + 1) * moved // layers > at * moved // layers else higher for at in range(layers)]
    least = kept[ladder[-1]] / kept["none"]
    raise ValueError(f"blocks can't keep {budget:g} of what they would; policy '{ladder[-1]}' keeps {least:.3f} of it")


def _checkpointed(forward: Callable[..., Any], selectively: bool) -> Callable[..., Any]:
    """`forward`, of which all but its input (or what is dear) is computed again.

    A function of our own around torch's, because the compiler begins at the first frame that is not torch's: it would pass
    a partial of `checkpoint` by, and everything inside of it, without a word.
    """
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_dear)

    def run(*args: Any, **kwargs: Any) -> Any:
        if selectively:
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _offloaded(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, whose saved tensors wait in host memory. Weights stay; a tensor saved several times is copied once.

    Copies run in order with the computation: they cost its time, and nobody can overwrite what is being copied.
    """

    def storage(tensor: torch.Tensor) -> int:
        return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage().data_ptr()

    def run(*args: Any, **kwargs: Any) -> Any:
        weights = {storage(parameter) for parameter in block.parameters()}
        # The originals are held until the block is through, so that no second tensor can have a first one's address.
        copies: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

        def pack(tensor: torch.Tensor) -> Any:
            if tensor.numel() * tensor.element_size() < _SMALL or isinstance(tensor, DTensor) or storage(tensor) in weights:
                return tensor
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor._version)
            if key not in copies:
                host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                host.copy_(tensor, non_blocking=True)
                copies[key] = (tensor, host)
            return tensor.device, copies[key][1]

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            device, host = packed
            return host.to(device, non_blocking=True)

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return forward(*args, **kwargs)
        finally:
            copies.clear()

    return run


def apply_policies(blocks: Sequence[nn.Module], policies: Sequence[str], *, compiled: bool = False) -> None:
    """Make each block keep what its policy says, and compile it where asked to, before it is sharded.

    The blocks' `forward` is replaced, so parameter names stay as they are.

    none       keep every intermediate result
    selective  keep matrix products and attention, compute the rest again
    full       keep only the block's input
    offload    keep everything, in host memory

    Checkpointing is inside of what is compiled, so that the compiler sees what is computed again and fuses it; copies to
    the host are outside, because it can't see them.
    """
    for block, policy in zip(blocks, policies, strict=True):
        assert policy in POLICIES, policy
        if policy in ("selective", "full"):
            block.forward = _checkpointed(block.forward, selectively=policy == "selective")
        if policy == "offload":
            block.forward = _offloaded(block, torch.compile(block.forward) if compiled else block.forward)
        elif compiled:
            block.compile()
