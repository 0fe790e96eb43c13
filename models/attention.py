"""Causal grouped-query self-attention: projections around a replaceable `attend`.

Shape legend: B batch, S sequence, D model width, H query heads, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..kernels.attention import Attend, CausalAttention
from ..kernels.documents import Documents
from .norm import Norm
from .part import BIAS, Part, WeightRule, reads_stream, writes_stream
from .part_config import AttentionConfig, NormConfig
from .protocol import TensorRole
from .rotary import RotaryTable, rotate


class Sinks(Part):
    """A learned logit of each head, which begins at zero and does not decay."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads))

    def weight_rule(self, name: str) -> WeightRule:
        """Return the rule of the weight, the only parameter."""
        assert name == "weight", name
        return BIAS

    def forward(self) -> torch.Tensor:
        """Return the logits of this rank's heads, (H,)."""
        return self.weight


class Attention(Part):
    """Causal grouped-query self-attention. Only `attend` looks at other positions, and a run may replace it."""

    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {
        "wq": TensorRole.COLUMN,
        "wk": TensorRole.KEY_VALUE,
        "wv": TensorRole.KEY_VALUE,
        "wo": TensorRole.ROW,
        "q_norm": TensorRole.HEADS_NORM,
        "k_norm": TensorRole.KEY_HEADS_NORM,
        "sinks": TensorRole.HEADS_VECTOR,
    }
    num_inputs = 3

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config, self.head_dim, self.kv_heads = config, config.head_dim, config.kv_heads
        self.wq = nn.Linear(config.dim, config.q_width, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, config.kv_width, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, config.kv_width, bias=config.qkv_bias)
        self.wo = nn.Linear(config.q_width, config.dim, bias=config.output_bias)
        self.q_norm = None if config.q_norm is None else Norm(config.q_norm)
        self.k_norm = None if config.k_norm is None else Norm(config.k_norm)
        self.sinks = Sinks(config.heads) if config.sinks else None
        reads = reads_stream(config.scales)
        self.weight_rules = {
            "wq": replace(reads, row_parts=(config.head_dim,) * config.heads),
            **dict.fromkeys(("wk", "wv"), replace(reads, row_parts=(config.head_dim,) * config.kv_heads)),
            "wo": writes_stream(config.scales),
        }
        self.attend: Attend = CausalAttention()

    def forward(self, inputs: Sequence[torch.Tensor], rotary: RotaryTable | None, documents: Documents | None) -> torch.Tensor:
        """Attend. inputs: the same (B, S, D) for query, key and value. Returns (B, S, D).

        The projections' shapes give the number of heads, so they may be column shards.
        """
        q_BSD, k_BSD, v_BSD = inputs
        q_BSHE = self._heads(self.wq(q_BSD), self.q_norm, rotary)
        k_BSKE = self._heads(self.wk(k_BSD), self.k_norm, rotary)
        v_BSKE = self.wv(v_BSD).unflatten(-1, (-1, self.head_dim))
        config, sinks_H = self.config, None if self.sinks is None else self.sinks()
        how: dict[str, Any] = {"scale": config.scale, "window": config.window, "softcap": config.softcap, "sinks": sinks_H}
        out_BSHE = self.attend(q_BSHE, k_BSKE, v_BSKE, documents, **how)
        return self.wo(out_BSHE.flatten(-2))

    def _heads(self, x: torch.Tensor, norm: Norm | None, rotary: RotaryTable | None) -> torch.Tensor:
        """Divide queries or keys into heads, norm them before or after that, and rotate them."""
        if norm is not None and not self._norms_each_head(norm.config):
            x = norm(x)
        x_BSHE = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self._norms_each_head(norm.config):
            x_BSHE = norm(x_BSHE)
        if rotary is None or self.config.rotary is None:
            return x_BSHE
        return rotate(x_BSHE, rotary, interleaved=self.config.rotary.interleaved)

    def _norms_each_head(self, norm: NormConfig) -> bool:
        return norm.width == self.head_dim
