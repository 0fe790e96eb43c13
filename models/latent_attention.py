"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, 2.1): keys and values of all heads come out of one narrow latent.

A query's and a key's head has a part without positions, and a part with rotary positions, which all heads of a key share.

Shape legend: B batch, S sequence, D model width, H heads, E width of a query's or key's head, V width of a value's, L latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.attention import Attend, CausalAttention
from ..kernels.documents import Documents
from .norm import Norm
from .part import Part, reads_stream, writes_stream
from .part_config import LatentAttentionConfig
from .protocol import TensorRole
from .rotary import RotaryTable, rotate


class LatentAttention(Part):
    """Causal multi-head latent attention. Only `attend` looks at other positions, and a run may replace it.

    wq, or wq_a, q_norm, wq_b  to queries, directly or through a latent of their own
    wkv_a, kv_norm, wkv_b      to the latent and the keys' shared part, and from the latent to keys and values
    """

    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {
        "wq": TensorRole.COLUMN,
        "wq_a": TensorRole.LATENT,
        "q_norm": TensorRole.LATENT,
        "wq_b": TensorRole.COLUMN,
        "wkv_a": TensorRole.LATENT,
        "kv_norm": TensorRole.LATENT,
        "wkv_b": TensorRole.COLUMN,
        "shared_key": TensorRole.SHARED,
        "wo": TensorRole.ROW,
    }
    num_inputs = 2

    def __init__(self, config: LatentAttentionConfig) -> None:
        super().__init__()
        self.config = config
        q_width = config.heads * config.head_dim
        if config.q_norm is None:
            self.wq = nn.Linear(config.dim, q_width, bias=False)
        else:
            self.wq_a = nn.Linear(config.dim, config.q_norm.width, bias=False)
            self.q_norm = Norm(config.q_norm)
            self.wq_b = nn.Linear(config.q_norm.width, q_width, bias=False)
        self.wkv_a = nn.Linear(config.dim, config.kv_norm.width + config.rotary.width, bias=False)
        self.kv_norm = Norm(config.kv_norm)
        self.wkv_b = nn.Linear(config.kv_norm.width, config.heads * (config.nope_dim + config.value_dim), bias=False)
        self.shared_key = nn.Identity()  # where tensor-parallel ranks begin to use it for heads of their own
        self.wo = nn.Linear(config.heads * config.value_dim, config.dim, bias=False)
        reads = reads_stream(config.scales)
        self.weight_rules = {
            **dict.fromkeys(("wq", "wq_b"), replace(reads, row_parts=(config.head_dim,) * config.heads)),
            "wq_a": reads,
            "wkv_a": replace(reads, row_parts=(config.kv_norm.width, config.rotary.width)),
            "wkv_b": replace(reads, row_parts=(config.nope_dim, config.value_dim) * config.heads),
            "wo": writes_stream(config.scales),
        }
        self.attend: Attend = CausalAttention()

    def forward(self, inputs: Sequence[torch.Tensor], rotary: RotaryTable | None, documents: Documents | None) -> torch.Tensor:
        """Attend. inputs: the same (B, S, D), `num_inputs` times. Returns (B, S, D).

        Values are filled up with zeros to the width of keys, which kernels want.
        """
        config, (q_BSD, kv_BSD) = self.config, inputs
        assert rotary is not None, "a head's second part has positions"
        wide_BSL = self.wq(q_BSD) if config.q_norm is None else self.wq_b(self.q_norm(self.wq_a(q_BSD)))
        q_BSHE, turning_BSHE = wide_BSL.unflatten(-1, (-1, config.head_dim)).split([config.nope_dim, config.rotary.width], -1)
        latent_BSL, key_BSE = self.wkv_a(kv_BSD).split([config.kv_norm.width, config.rotary.width], -1)
        both_BSHE = self.wkv_b(self.kv_norm(latent_BSL)).unflatten(-1, (-1, config.nope_dim + config.value_dim))
        k_BSHE, v_BSHV = both_BSHE.split([config.nope_dim, config.value_dim], -1)
        interleaved = config.rotary.interleaved
        key_BSHE = rotate(self.shared_key(key_BSE).unsqueeze(-2), rotary, interleaved=interleaved)
        q_BSHE = torch.cat((q_BSHE, rotate(turning_BSHE, rotary, interleaved=interleaved)), dim=-1)
        k_BSHE = torch.cat((k_BSHE, key_BSHE.expand(-1, -1, k_BSHE.shape[2], -1)), dim=-1)
        v_BSHE = F.pad(v_BSHV, (0, config.head_dim - config.value_dim))
        out_BSHE = self.attend(q_BSHE, k_BSHE, v_BSHE, documents, scale=config.scale, softcap=config.softcap)
        return self.wo(out_BSHE[..., : config.value_dim].flatten(-2))
