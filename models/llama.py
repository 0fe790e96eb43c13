"""A Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU. It names no rank.

Shape legend: B batch, S sequence, D model width, H query heads, K key/value heads, E head width, F feed-forward width,
V vocabulary, T = B·S tokens.

Where parallelism must act inside the model it replaces a callable: `Attention.attend` and `Llama.token_loss`. Their
plain forms live in `attention.py` and `loss.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import norm, swiglu
from ..kernels.attention import Attend, attend, positions
from ..kernels.loss import linear_cross_entropy
from .config import DecoderConfig
from .init import Constant, Initial, Normal

TokenLoss = Callable[..., torch.Tensor]


def rotary_table(positions_S: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary angles (arXiv 2104.09864), each (…, S, E/2), fp32 (fp64 if positions are fp64)."""
    dtype = torch.float64 if positions_S.dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, head_dim, 2, device=positions_S.device, dtype=dtype) / head_dim
    angles = positions_S.to(dtype).unsqueeze(-1) * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x_BSHE: torch.Tensor, cos_SE: torch.Tensor, sin_SE: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + E/2), the "rotate half" convention of Hugging Face. Tables are (S, E/2) or (B, S, E/2)."""
    cos, sin = cos_SE.unsqueeze(-2), sin_SE.unsqueeze(-2)
    first, second = x_BSHE.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BSHE.dtype)


class Attention(nn.Module):
    """Causal grouped-query self-attention."""

    def __init__(self, dim: int, heads: int, kv_heads: int, scale: float) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.scale = scale
        self.wq = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.attend: Attend = attend

    def forward(
        self, given: Sequence[torch.Tensor], rotary: tuple[torch.Tensor, torch.Tensor], documents_BS: torch.Tensor | None
    ) -> torch.Tensor:
        """The same (B, S, D) for query, key and value → (B, S, D).

        The number of heads is read off the projections, so that they may be column shards.
        """
        q_BSHE, k_BSKE, v_BSKE = (
            project(x_BSD).unflatten(-1, (-1, self.head_dim))
            for project, x_BSD in zip((self.wq, self.wk, self.wv), given, strict=True)
        )
        q_BSHE, k_BSKE = rotate(q_BSHE, *rotary), rotate(k_BSKE, *rotary)
        out_BSHE = self.attend(q_BSHE, k_BSKE, v_BSKE, documents_BS, scale=self.scale)
        return self.wo(out_BSHE.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x) (arXiv 2002.05202).

    fused  whether the kernels of `swiglu.py` may be used: they read the weights, and nobody sees the projections' calls
    """

    fused = False

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)

    def uses(self, x_BSD: torch.Tensor) -> int:
        """How many products take the input: gate's and up's, or one in place of both."""
        return 1 if self.fused and swiglu.fits(x_BSD, self.w1.weight) else 2

    def forward(self, given: Sequence[torch.Tensor]) -> torch.Tensor:
        """The same (B, S, D) `uses` times → (B, S, D)."""
        if len(given) == 1:
            x_BSD = given[0]
            y_TD = swiglu.feed_forward(x_BSD.flatten(0, -2), self.w1.weight, self.w3.weight, self.w2.weight)
            return y_TD.view_as(x_BSD)
        gate_BSD, up_BSD = given
        return self.w2(F.silu(self.w1(gate_BSD)) * self.w3(up_BSD))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream times `residual` (muP).

    fused  whether the kernels of `norm.py` may be used: they read the norms' weights, and nobody sees the norms' calls
    """

    fused = False

    def __init__(self, dim: int, heads: int, kv_heads: int, ffn_dim: int, eps: float, scale: float, residual: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps)
        self.attention = Attention(dim, heads, kv_heads, scale)
        self.ffn_norm = nn.RMSNorm(dim, eps)
        self.ffn = FeedForward(dim, ffn_dim)
        self.residual, self.eps = residual, eps

    def forward(
        self, x_BSD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], documents_BS: torch.Tensor | None
    ) -> torch.Tensor:
        """x_BSD → (B, S, D)."""
        x_BSD, *given = self._normed(self.attention_norm, x_BSD, 3)
        x_BSD = self._add(x_BSD, self.attention(given, rotary, documents_BS))
        x_BSD, *given = self._normed(self.ffn_norm, x_BSD, self.ffn.uses(x_BSD))
        return self._add(x_BSD, self.ffn(given))

    def _normed(self, module: nn.RMSNorm, x_BSD: torch.Tensor, uses: int) -> tuple[torch.Tensor, ...]:
        """The residual stream, and `uses` times its norm."""
        if self.fused and norm.fits(x_BSD):
            return norm.normed(x_BSD, module.weight, self.eps, uses)
        return x_BSD, *[module(x_BSD)] * uses

    def _add(self, x_BSD: torch.Tensor, y_BSD: torch.Tensor) -> torch.Tensor:
        # A compiler does not know that a product with 1 is nothing: its gradient would be a pass over memory.
        return x_BSD + y_BSD if self.residual == 1.0 else x_BSD + self.residual * y_BSD


class Llama(nn.Module):
    """The decoder. A pipeline stage is the same module with `embed`, `norm` and `head` or some layers taken out."""

    def __init__(
        self,
        *,
        dim: int,
        layers: int,
        heads: int,
        kv_heads: int,
        ffn_dim: int,
        vocabulary: int,
        tied: bool = False,
        norm_eps: float = 1e-5,
        rope_theta: float = 500_000.0,
        init_std: float = 0.02,
        mup_base: int | None = None,
        mup_embedding: float = 1.0,
        mup_residual: float = 1.0,
    ) -> None:
        super().__init__()
        self.config = DecoderConfig(
            dim=dim,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            ffn_dim=ffn_dim,
            vocabulary=vocabulary,
            tied=tied,
            norm_eps=norm_eps,
            rope_theta=rope_theta,
            init_std=init_std,
            mup_base=mup_base,
            mup_embedding=mup_embedding,
            mup_residual=mup_residual,
        )
        self.dim, self.depth, self.vocabulary, self.tied = dim, layers, vocabulary, tied
        self.heads, self.kv_heads, self.ffn_dim = heads, kv_heads, ffn_dim
        self.rope_theta, self.init_std, self.norm_eps = rope_theta, init_std, norm_eps
        self.head_dim = dim // heads
        self.width = dim / mup_base if mup_base else 1.0  # muP's m_width
        self.embedding_multiplier = mup_embedding
        scale = 1 / self.head_dim if mup_base else 1 / math.sqrt(self.head_dim)
        self.embed: nn.Embedding | None = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleDict(
            {str(i): Block(dim, heads, kv_heads, ffn_dim, norm_eps, scale, mup_residual) for i in range(layers)}
        )
        self.norm: nn.RMSNorm | None = nn.RMSNorm(dim, norm_eps)
        self.head: nn.Linear | None = nn.Linear(dim, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.token_loss: TokenLoss = linear_cross_entropy

    def forward(
        self,
        inputs: torch.Tensor,
        targets_BS: torch.Tensor | None = None,
        documents_BS: torch.Tensor | None = None,
        positions_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids (B, S) → logits (B, S, V), or with targets the sum of token losses (scalar, at least fp32).

        A stage without `embed` takes hidden states (B, S, D) instead; one without `head` returns them.
        documents_BS: attention stays inside a document, and positions restart there. positions_BS overrides them (a
        slice of a longer sequence has no other way to know where it lies).
        """
        if positions_BS is None:
            plain = torch.arange(inputs.shape[1], device=inputs.device)
            positions_BS = plain if documents_BS is None else positions(documents_BS)
        if self.embed is not None:
            x_BSD = self.embed(inputs)
            if self.embedding_multiplier != 1.0:
                x_BSD = x_BSD * self.embedding_multiplier
        else:
            x_BSD = inputs
        exact = torch.float64 if x_BSD.dtype == torch.float64 else torch.float32
        rotary = rotary_table(positions_BS.to(exact), self.head_dim, self.rope_theta)
        for layer in self.layers.values():
            x_BSD = layer(x_BSD, rotary, documents_BS)
        if self.norm is None or self.head is None:
            return x_BSD
        x_BSD = self.norm(x_BSD)
        if self.width != 1.0:
            x_BSD = x_BSD / self.width
        if targets_BS is None:
            return self.head(x_BSD)
        return self.token_loss(x_BSD.flatten(0, 1), self.head.weight, targets_BS.flatten())

    def initial(self, name: str) -> Initial:
        """How a parameter begins: matrices normal, output projections scaled by depth, norms at one (rule R3 draws it)."""
        if name.endswith("norm.weight"):
            return Constant(1.0)
        if name.startswith(("embed.", "head.")):
            return Normal(self.init_std)
        std = self.init_std / math.sqrt(self.width)
        if name.endswith(("attention.wo.weight", "ffn.w2.weight")):
            std /= math.sqrt(2 * self.depth)
        return Normal(std)

    def decays(self, name: str) -> bool:
        """Whether weight decay applies: matrices inside the blocks and the head; not norms, not the embedding."""
        return not name.endswith("norm.weight") and not name.startswith("embed.")

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate: 1 / m_width for matrices inside the blocks under muP, otherwise 1."""
        return 1 / self.width if name.startswith("layers.") and not name.endswith("norm.weight") else 1.0

    def carve(self, layers: range, *, first: bool, last: bool) -> Llama:
        """Return one pipeline stage: a copy of the model (on the meta device) without what other stages hold.

        Parameter names stay. Where the head is tied to the embedding, the last stage's `head.weight` becomes a parameter of
        its own.
        """
        if first and last:
            return self
        stage = copy.deepcopy(self)
        for name in list(stage.layers):
            if int(name) not in layers:
                del stage.layers[name]
        if not first:
            stage.embed = None
        if not last:
            stage.norm = stage.head = None
        return stage
