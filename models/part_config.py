"""Configs of a decoder's parts: one frozen dataclass for each kind of part, which also counts what the part holds.

`DecoderConfig.block` makes them from the keys of `model`, and each part's class takes its own. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .rope_config import RotaryConfig

if TYPE_CHECKING:
    from .mixture.config import MixtureConfig


@dataclass(frozen=True)
class MatrixScales:
    """The initial deviation and learning rate of a part's matrices.

    std       initial standard deviation of matrices that read the residual stream
    out_std   of those that write to it
    lr_scale  factor on their learning rate
    """

    std: float
    out_std: float
    lr_scale: float


@dataclass(frozen=True)
class NormConfig:
    """RMSNorm over a width.

    eps       added to the mean square
    plus_one  whether the factor is 1 + weight, so that weights begin at zero
    """

    width: int
    eps: float
    plus_one: bool = False


@dataclass(frozen=True)
class AttentionConfig:
    """Causal grouped-query attention.

    dim          width of the residual stream
    head_dim     width of a head
    scale        factor on the scores
    rotary       rotary positions; None: no positions
    qkv_bias     whether the projections to queries, keys and values have biases
    output_bias  whether the projection back to the stream has one
    q_norm       norm of queries, over a head's width or over all heads; None: none
    k_norm       the same of keys
    window       positions that a query sees, its own included; None: all before it
    softcap      scores become cap · tanh(score / cap); None: they stay
    sinks        whether each head has a learned logit in the softmax's sum
    """

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotary: RotaryConfig | None
    scales: MatrixScales
    qkv_bias: bool = False
    output_bias: bool = False
    q_norm: NormConfig | None = None
    k_norm: NormConfig | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def q_width(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def matrices(self) -> int:
        """Count the matrix parameters: q and output, k and v."""
        return 2 * self.dim * (self.q_width + self.kv_width)

    @property
    def vectors(self) -> int:
        """Count the other parameters."""
        biases = self.qkv_bias * (self.q_width + 2 * self.kv_width) + self.output_bias * self.dim
        norms = sum(norm.width for norm in (self.q_norm, self.k_norm) if norm is not None)
        return biases + norms + self.sinks * self.heads

    @property
    def products(self) -> int:
        """Count the matrix products with weights."""
        return 4

    def kept(self, tp: int) -> float:
        """Count the elements of queries, keys, values and their output on a rank."""
        return 2 * (self.q_width + self._rank_kv_width(tp)) / tp

    def kept_normed(self, tp: int) -> float:
        """Count the elements of queries and keys before their norms."""
        return 0.0 if self.q_norm is None else (self.q_width + self._rank_kv_width(tp)) / tp

    def _rank_kv_width(self, tp: int) -> int:
        """Return the width of all ranks' key heads: with fewer heads than ranks, every rank has one."""
        return max(self.kv_heads, tp) * self.head_dim

    @property
    def normed_rows(self) -> int:
        """Count the rows that the norms of queries and keys normalise for each token."""
        if self.q_norm is None:
            return 0
        return self.heads + self.kv_heads if self.q_norm.width == self.head_dim else 2

    def keys_seen(self, seq_len: int) -> float:
        """Count twice the keys that a query sees on average, its own by half: all positions, where there is no window."""
        if self.window is None or self.window >= seq_len:
            return seq_len
        return self.window * (2 * seq_len - self.window + 1) / seq_len - 1

    def score_flops(self, seq_len: int) -> float:
        """Count the forward FLOPs of scores and weighted sums per token, without a causal mask."""
        return 4.0 * self.q_width * self.keys_seen(seq_len)


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Causal multi-head latent attention.

    dim        width of the residual stream
    nope_dim   width of the part of a query's or key's head without positions; `rotary.width` is that of the part with
    value_dim  width of a value's head
    scale      factor on the scores
    q_norm     norm of the queries' latent; None: queries have none
    kv_norm    norm of the latent of keys and values
    softcap    scores become cap · tanh(score / cap); None: they stay
    """

    dim: int
    heads: int
    nope_dim: int
    value_dim: int
    scale: float
    rotary: RotaryConfig
    scales: MatrixScales
    q_norm: NormConfig | None
    kv_norm: NormConfig
    softcap: float | None = None
    window: None = None

    @property
    def head_dim(self) -> int:
        """Width of a query's or key's head."""
        return self.nope_dim + self.rotary.width

    @property
    def products(self) -> int:
        """Count the matrix products with weights."""
        return 4 if self.q_norm is None else 5

    @property
    def matrices(self) -> int:
        """Count the matrix parameters."""
        q_width, latent = self.heads * self.head_dim, self.kv_norm.width
        queries = self.dim * q_width if self.q_norm is None else self.q_norm.width * (self.dim + q_width)
        keys_values = self.dim * (latent + self.rotary.width) + latent * self.heads * (self.nope_dim + self.value_dim)
        return queries + keys_values + self.heads * self.value_dim * self.dim

    @property
    def vectors(self) -> int:
        """Count the other parameters."""
        return self.kv_norm.width + (0 if self.q_norm is None else self.q_norm.width)

    def score_flops(self, seq_len: int) -> float:
        """Count the forward FLOPs of scores and weighted sums per token, without a causal mask."""
        return 2.0 * self.heads * (self.head_dim + self.value_dim) * seq_len

    def kept(self, tp: int) -> float:
        """Count the elements of queries, keys, values as wide as keys, their output, and what of it goes on."""
        return self.heads * (4 * self.head_dim + self.value_dim) / tp

    def kept_normed(self, tp: int) -> float:
        """Count the elements of latents before and after their norms."""
        queries = 0 if self.q_norm is None else 2 * self.q_norm.width
        return queries + 2 * self.kv_norm.width + self.rotary.width

    @property
    def normed_rows(self) -> int:
        """Count the rows that norms inside normalise for each token; every rank has them all."""
        return 1 if self.q_norm is None else 2


@dataclass(frozen=True)
class FeedForwardConfig:
    """A gated feed-forward between the residual stream's width and `ffn_dim`.

    activation  of the gate: silu makes it SwiGLU, gelu_tanh or gelu GeGLU
    bias        whether its three projections have biases
    """

    dim: int
    ffn_dim: int
    scales: MatrixScales
    activation: str = "silu"
    bias: bool = False

    @property
    def matrices(self) -> int:
        """Count the matrix parameters: gate, up and down."""
        return 3 * self.dim * self.ffn_dim

    @property
    def active_matrices(self) -> int:
        """Count the matrix parameters that one token is multiplied with: all."""
        return self.matrices

    @property
    def dispatched(self) -> int:
        """Count the elements of copies of a token made for its experts: none."""
        return 0

    def kept_beside(self, policy: str, unit: int, accum: int) -> float:
        """Count the bytes per token that it keeps for its backward pass beside its inner width's, under an activation policy.

        unit, accum: bytes of an element that is computed with, and of one that is added up. Here they are of its input.
        """
        return unit * self.dim if policy == "none" else 0.0

    def recomputed_matrices(self, policy: str, *, last_read: bool) -> int:
        """Count the elements of the matrices that a token is multiplied with again in the backward pass.

        last_read: whether the block reads the output in its backward pass; only then is it computed again.
        """
        again = {"full": 2, "selective": 1}.get(policy)
        return 0 if again is None else (again + last_read) * self.dim * self.ffn_dim

    @property
    def vectors(self) -> int:
        """Count the other parameters."""
        return self.bias * (2 * self.ffn_dim + self.dim)

    @property
    def active_vectors(self) -> int:
        """Count the other parameters that one token passes: all."""
        return self.vectors

    @property
    def is_plain_swiglu(self) -> bool:
        """True if it is SwiGLU without biases, which kernels may fuse."""
        return self.activation == "silu" and not self.bias


@dataclass(frozen=True)
class BlockConfig:
    """One block: its parts, their norms, and muP's factor on what each part adds to the stream.

    norms_before  whether a part reads the normed stream
    norms_after   whether what a part adds to the stream is normed
    """

    attention: AttentionConfig | LatentAttentionConfig
    ffn: FeedForwardConfig | MixtureConfig
    norm: NormConfig
    residual: float
    norms_before: bool = True
    norms_after: bool = False

    @property
    def matrices(self) -> int:
        """Count the matrix parameters."""
        return self.attention.matrices + self.ffn.matrices

    @property
    def active_matrices(self) -> int:
        """Count the matrix parameters that one token is multiplied with."""
        return self.attention.matrices + self.ffn.active_matrices

    @property
    def vectors(self) -> int:
        """Count the other parameters."""
        return self._outer_vectors + self.ffn.vectors

    @property
    def active_vectors(self) -> int:
        """Count the other parameters that one token passes."""
        return self._outer_vectors + self.ffn.active_vectors

    @property
    def _outer_vectors(self) -> int:
        norms = 2 * (self.norms_before + self.norms_after) * self.norm.width
        return self.attention.vectors + norms
