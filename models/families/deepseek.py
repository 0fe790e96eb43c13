"""DeepSeek-V3: latent attention, dense first layers, and experts that are chosen within groups."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from ..config import DecoderConfig
from ..rope_config import yarn_factor
from .family import Family, Json

_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_EXPERTS = {
    "n_routed_experts": "count",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "ffn_dim",
    "n_shared_experts": "shared",
    "first_k_dense_replace": "dense_layers",
    "norm_topk_prob": "renormalise",
    "routed_scaling_factor": "scale",
    "n_group": "groups",
    "topk_group": "top_groups",
}
"""Key of config.json → key of `model.experts`."""


class DeepseekV3(Family):
    """Sigmoid scores, a bias of the choice, shared experts. Norms of latents have an eps of 1e-6 whatever the file says.

    The layers behind the last, which predict more tokens (MTP), are left behind: as many as `num_nextn_predict_layers` says.
    """

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    constants: ClassVar[Json] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }
    parts: ClassVar[Json] = {"attention": "mla"}
    defaults: ClassVar[Json] = {
        "max_position_embeddings": 4096,
        "rope_interleave": True,
        **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        **{"n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1},
        **{"first_k_dense_replace": 3, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4},
    }

    def stem(self, name: str, theirs: Json) -> str | None:
        """Return a weight's name, or None for one of a layer that predicts more tokens."""
        _, _, rest = name.partition("model.layers.")
        layer, layers = rest.partition(".")[0], theirs["num_hidden_layers"]
        more = theirs.get("num_nextn_predict_layers", 1) or 0
        return None if layer.isdecimal() and layers <= int(layer) < layers + more else name

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        latent = {name: theirs[name] for name in _LATENT}
        experts = {ours: theirs[key] for key, ours in _EXPERTS.items()}
        found = super().read(theirs)
        return {
            **found,
            "kv_heads": found["heads"],
            "head_dim": None,
            "mla": latent,
            "rope_interleaved": bool(theirs["rope_interleave"]),
            "attention_scale": self._scale(latent, found["rope_scaling"]),
            "experts": {**experts, "scores": "sigmoid", "bias": True},
        }

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json."""
        return {
            **super().write(config),
            **{name: getattr(config.mla, name) for name in _LATENT},
            **{key: getattr(config.experts, ours) for key, ours in _EXPERTS.items()},
            "head_dim": config.mla.qk_rope_head_dim,
            "moe_intermediate_size": config.experts.ffn_dim or config.ffn_dim,
            "first_k_dense_replace": config.layers - len(config.mixture_layers()),
            "rope_interleave": config.rope_interleaved,
            "num_nextn_predict_layers": 0,
        }

    def _scale(self, latent: Json, scaling: Json) -> float | None:
        """Return the factor on scores, which long contexts raise by the square of yarn's attention factor."""
        if scaling["kind"] != "yarn" or not scaling["mscale_all_dim"]:
            return None
        factor = yarn_factor(scaling["factor"], scaling["mscale_all_dim"])
        return factor**2 / math.sqrt(latent["qk_nope_head_dim"] + latent["qk_rope_head_dim"])
