"""Small decoders of every part, whose logits and gradients another library computed: `tests/fixtures/make_golden_parts.py`.

The keys are ours. Shapes of weights come with the gradients, and values are drawn here; nothing comes from the tested model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden_parts.safetensors"
VOCABULARY, SEQ_LEN, IGNORED = 11, 12, -100
SHAPE: dict[str, Any] = {
    "dim": 16,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "ffn_dim": 12,
    "vocabulary": VOCABULARY,
    "norm_eps": 1e-3,  # large, as theta is small, so that a wrong one shows in a small model
    "rope_theta": 100.0,
}

CASES: dict[str, dict[str, Any]] = {
    "biases of q, k and v": {"qkv_bias": True},
    "all biases": {"qkv_bias": True, "output_bias": True, "ffn_bias": True},
    "norm of each head, own head width": {"qk_norm": "head", "head_dim": 6},
    "norms after, norm of all heads": {"qk_norm": "full", "norm_place": "after"},
    "layers without positions": {"layers": 3, "layer_types": ["full", "full", "nope"]},
    "llama3 scaling": {
        "rope_scaling": {"kind": "llama3", "factor": 4.0, "original_positions": 24, "high_freq_factor": 2.0},
        "head_dim": 8,
    },
    "yarn": {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_positions": 24, "beta_fast": 3.0}, "head_dim": 8},
    "yarn with two mscales": {
        "rope_scaling": {
            "kind": "yarn",
            "factor": 4.0,
            "original_positions": 24,
            "beta_fast": 3.0,
            "truncate": False,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
        },
        "head_dim": 8,
    },
    "longrope": {
        "rope_scaling": {
            "kind": "longrope",
            "factor": 4.0,
            "original_positions": 6,
            "short_factor": [1.0, 1.0],
            "long_factor": [1.5, 3.0],
        }
    },
    "longrope of short sequences": {
        "rope_scaling": {
            "kind": "longrope",
            "factor": 2.0,
            "original_positions": 48,
            "short_factor": [1.0, 2.5],
            "long_factor": [1.5, 3.0],
            "long": False,
            "attention_factor": 1.2,
        }
    },
    "partial width, interleaved pairs": {
        "head_dim": 8,
        "rope_fraction": 0.5,
        "rope_interleaved": True,
        "qkv_bias": True,
    },
    "GeGLU, norms of 1 + weight, embedding scale": {
        "ffn_activation": "gelu_tanh",
        "norm": "rms_plus_one",
        "embedding_scale": 4.0,
        "tied": True,
    },
    "exact GeGLU": {"ffn_activation": "gelu"},
    "latent attention": {
        "kv_heads": 4,
        "attention": "mla",
        "rope_interleaved": True,
        "mla": {"q_lora_rank": 6, "kv_lora_rank": 5, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 2},
    },
    "latent attention, whole queries": {
        "kv_heads": 4,
        "attention": "mla",
        "rope_interleaved": True,
        "mla": {"kv_lora_rank": 5, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 7},
    },
    "a window in every layer": {"layer_types": ["sliding"], "sliding_window": 5},
    "soft-caps and windows": {
        "norm_place": "around",
        "norm": "rms_plus_one",
        "ffn_activation": "gelu_tanh",
        "embedding_scale": 4.0,
        "tied": True,
        "layer_types": ["sliding", "full"],
        "sliding_window": 5,
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "attention_scale": 9.0**-0.5,
    },
    "theta and scaling by kind of layer": {
        "layers": 3,
        "head_dim": 8,
        "norm_place": "around",
        "norm": "rms_plus_one",
        "qk_norm": "head",
        "ffn_activation": "gelu_tanh",
        "embedding_scale": 4.0,
        "tied": True,
        "layer_types": ["sliding", "sliding", "full"],
        "sliding_window": 4,
        "rope_theta_sliding": 10.0,
        "rope_scaling": {"kind": "linear", "factor": 4.0},
        "attention_scale": 9.0**-0.5,
    },
    "windows, yarn in full layers only": {
        "head_dim": 8,
        "norm_place": "after",
        "qk_norm": "full",
        "layer_types": ["sliding", "full"],
        "sliding_window": 5,
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_positions": 24, "beta_fast": 3.0},
    },
}
"""Case → its keys besides SHAPE."""


def weights(shapes: Mapping[str, tuple[int, ...]], plus_one: bool) -> dict[str, torch.Tensor]:
    """Draw weights as large as trained ones, in fp64, in the order of their names. Norms' factors are around one."""
    draw = np.random.RandomState(0)
    found: dict[str, torch.Tensor] = {}
    for name in sorted(shapes):
        values = torch.from_numpy(draw.standard_normal(shapes[name]))
        centre = 1.0 if name.endswith("norm.weight") and not plus_one else 0.0
        found[name] = centre + (0.2 if values.dim() == 1 else 0.4) * values
    return found


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Draw tokens and targets, each (2, S). The first target of each sequence carries no loss."""
    drawn = torch.from_numpy(np.random.RandomState(1).randint(0, VOCABULARY, (2, SEQ_LEN + 1)))
    targets_BS = drawn[:, 1:].clone()
    targets_BS[:, 0] = IGNORED
    return drawn[:, :-1], targets_BS
