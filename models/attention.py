"""Causal grouped-query self-attention: projections around a replaceable `attend`.

Shape legend: B batch, S sequence, D model width, H query heads, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from ..kernels.attention import Attend, CausalAttention
from ..kernels.documents import Documents
from .part import Part, reads_stream, writes_stream
from .part_config import AttentionConfig
from .protocol import TensorRole
from .rotary import rotate


class Attention(Part):
    """Causal grouped-query self-attention. Only `attend` looks at other positions, and a run may replace it."""

    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {
        "wq": TensorRole.COLUMN,
        "wk": TensorRole.KEY_VALUE,
        "wv": TensorRole.KEY_VALUE,
        "wo": TensorRole.ROW,
    }

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.head_dim, self.kv_heads, self.scale = config.head_dim, config.kv_heads, config.scale
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, width, bias=False)
        self.wk = nn.Linear(config.dim, kv_width, bias=False)
        self.wv = nn.Linear(config.dim, kv_width, bias=False)
        self.wo = nn.Linear(width, config.dim, bias=False)
        self.weight_rules = {
            **dict.fromkeys(("wq", "wk", "wv"), reads_stream(config.scales)),
            "wo": writes_stream(config.scales),
        }
        self.attend: Attend = CausalAttention()

    def forward(
        self, inputs: Sequence[torch.Tensor], rotary: tuple[torch.Tensor, torch.Tensor], documents: Documents | None
    ) -> torch.Tensor:
        """Attend. inputs: the same (B, S, D) for query, key and value. Returns (B, S, D).

        The projections' shapes give the number of heads, so they may be column shards.
        """
        q_BSHE, k_BSKE, v_BSKE = (
            project(x_BSD).unflatten(-1, (-1, self.head_dim))
            for project, x_BSD in zip((self.wq, self.wk, self.wv), inputs, strict=True)
        )
        q_BSHE, k_BSKE = rotate(q_BSHE, *rotary), rotate(k_BSKE, *rotary)
        out_BSHE = self.attend(q_BSHE, k_BSKE, v_BSKE, documents, scale=self.scale)
        return self.wo(out_BSHE.flatten(-2))
