"""Configs of a decoder's parts: one frozen dataclass for each kind of part, which also counts what the part holds.

`DecoderConfig.block` makes them from the keys of `model`, and each part's class takes its own. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MatrixScales:
    """How the matrices of a part begin and learn.

    std       initial standard deviation of matrices that read the residual stream
    out_std   of those that write to it
    lr_scale  factor on their learning rate
    """

    std: float
    out_std: float
    lr_scale: float


@dataclass(frozen=True)
class NormConfig:
    """RMSNorm over a width. eps: added to the mean square."""

    width: int
    eps: float


@dataclass(frozen=True)
class AttentionConfig:
    """Causal grouped-query attention.

    dim       width of the residual stream
    head_dim  width of a head
    scale     factor on the scores
    rope_theta  base of the rotary angles
    """

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope_theta: float
    scales: MatrixScales

    @property
    def matrices(self) -> int:
        """Count the matrix parameters: q and output, k and v."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * self.dim * width + 2 * self.dim * kv_width


@dataclass(frozen=True)
class FeedForwardConfig:
    """SwiGLU between the residual stream's width and `ffn_dim`."""

    dim: int
    ffn_dim: int
    scales: MatrixScales

    @property
    def matrices(self) -> int:
        """Count the matrix parameters: gate, up and down."""
        return 3 * self.dim * self.ffn_dim


@dataclass(frozen=True)
class BlockConfig:
    """One block: its parts, their norms, and muP's factor on what each part adds to the stream."""

    attention: AttentionConfig
    ffn: FeedForwardConfig
    norm: NormConfig
    residual: float
