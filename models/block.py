"""One block of the decoder: attention and feed-forward around the residual stream.

Shape legend: B batch, S sequence, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..kernels.documents import Documents
from ..kernels.norm import FusedNorm
from .attention import Attention
from .feed_forward import FeedForward
from .latent_attention import LatentAttention
from .mixture.charges import Charges, Tally
from .mixture.config import MixtureConfig
from .mixture.mixture import Mixture
from .mixture.router import Carried
from .norm import Norm
from .part import Part
from .part_config import AttentionConfig, BlockConfig, FeedForwardConfig, LatentAttentionConfig
from .protocol import BlockKernels, TensorRole
from .rotary import RotaryTable

ATTENTIONS: dict[type, Callable[[Any], Attention | LatentAttention]] = {
    AttentionConfig: Attention,
    LatentAttentionConfig: LatentAttention,
}
"""Config → the attention that is built from it. A new kind is listed here."""

FEED_FORWARDS: dict[type, Callable[[Any], FeedForward | Mixture]] = {
    FeedForwardConfig: FeedForward,
    MixtureConfig: Mixture,
}
"""Config → the feed-forward that is built from it."""


class Block(Part):
    """Attention and feed-forward, each added to the residual stream times `residual` (muP).

    A norm stands before each part (Llama), after it (OLMo 2), or both (Gemma 2). In the place of one that is not there stands
    an identity: it has the norm's role under tensor parallelism, where it gathers the stream.

    products_kept  matrix products that selective checkpointing keeps: attention's, and the gate's, which is as large as it is
                   expensive to recompute
    fused_norm  the kernel to use where it fits; None: the norms' modules are called
    """

    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {
        "attention_norm": TensorRole.NORM,
        "attention_post_norm": TensorRole.POST_NORM,
        "ffn_norm": TensorRole.NORM,
        "ffn_post_norm": TensorRole.POST_NORM,
    }
    # A mixture works on the tokens as they lie, so the norm before it does not gather them.
    mixture_roles: ClassVar[Mapping[str, TensorRole]] = {
        **tensor_roles,
        "ffn_norm": TensorRole.POST_NORM,
        "ffn": TensorRole.TOKENS,
    }

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.attention_norm = Norm(config.norm) if config.norms_before else nn.Identity()
        self.attention = ATTENTIONS[type(config.attention)](config.attention)
        self.attention_post_norm = Norm(config.norm) if config.norms_after else nn.Identity()
        self.ffn_norm = Norm(config.norm) if config.norms_before else nn.Identity()
        self.ffn = FEED_FORWARDS[type(config.ffn)](config.ffn)
        self.ffn_post_norm = Norm(config.norm) if config.norms_after else nn.Identity()
        if isinstance(self.ffn, Mixture):
            self.tensor_roles = self.mixture_roles  # pyright: ignore[reportAttributeAccessIssue]
        self.residual, self.eps = config.residual, config.norm.eps
        self.products_kept = config.attention.products + 1
        self.fused_norm: FusedNorm | None = None

    def use_kernels(self, kernels: BlockKernels) -> None:
        """Compute with these kernels from now on."""
        self.attention.attend = kernels.attend
        self.fused_norm = kernels.norm
        self.ffn.use_kernels(kernels)

    def forward(
        self,
        x_BSD: torch.Tensor,
        rotary: RotaryTable | None,
        documents: Documents | None,
        charges: Charges | None = None,
        carried: Carried | None = None,
    ) -> tuple[torch.Tensor, Tally | None, torch.Tensor | None]:
        """Apply the block to the residual stream: (B, S, D) → (B, S, D), and what a mixture routed under charges.

        The tally is an output, so that a pass that recomputes the block counts nothing twice. carried: by recurrent routers;
        the last output is the state that goes to the next layer, None without such a router.
        """
        x_BSD, *inputs = self._normed(self.attention_norm, x_BSD, self.attention.num_inputs)
        x_BSD = self._add(x_BSD, self.attention_post_norm(self.attention(inputs, rotary, documents)))
        x_BSD, *inputs = self._normed(self.ffn_norm, x_BSD, self.ffn.num_inputs(x_BSD))
        y_BSD, tally, state_TP = (
            self.ffn(inputs, charges, carried) if isinstance(self.ffn, Mixture) else (self.ffn(inputs), None, None)
        )
        return self._add(x_BSD, self.ffn_post_norm(y_BSD)), tally, state_TP

    def _normed(self, module: Norm | nn.Identity, x_BSD: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        """Return the residual stream, and its norm `count` times."""
        if isinstance(module, Norm) and self.fused_norm is not None and self.fused_norm.fits(x_BSD):
            return self.fused_norm(x_BSD, module.factor(module.weight), self.eps, count)
        return x_BSD, *[module(x_BSD)] * count

    def _add(self, x_BSD: torch.Tensor, y_BSD: torch.Tensor) -> torch.Tensor:
        # A compiler does not drop a product with 1, and its gradient would be a pass over memory.
        return x_BSD + y_BSD if self.residual == 1.0 else x_BSD + self.residual * y_BSD
