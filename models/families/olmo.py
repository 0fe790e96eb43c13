"""OLMo 2 and 3, with norms after each part, and OLMoE: norms before each part, and experts."""

from __future__ import annotations

from typing import Any, ClassVar

from ..config import DecoderConfig
from .family import Family, Json
from .layer_kinds import read_layer_kinds, write_layer_kinds
from .positions import read_positions_by_kind, write_positions_by_kind


class Olmo2(Family):
    """All layers see everything."""

    model_type = "olmo2"
    architecture = "Olmo2ForCausalLM"
    constants: ClassVar[Json] = {"hidden_act": "silu"}
    parts: ClassVar[Json] = {"qk_norm": "full", "norm_place": "after"}
    defaults: ClassVar[Json] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        biased = bool(theirs.get("attention_bias"))
        return {**super().read(theirs), "qkv_bias": biased, "output_bias": biased}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json."""
        return {**super().write(config), "attention_bias": config.qkv_bias}


class Olmo3(Olmo2):
    """Three of four layers have a window; only the others' positions are scaled."""

    model_type = "olmo3"
    architecture = "Olmo3ForCausalLM"
    defaults: ClassVar[Json] = {**Olmo2.defaults, "sliding_window": 4096}

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        kinds = read_layer_kinds(theirs, lambda layer: (layer + 1) % 4 != 0)
        return {**super().read(theirs), **kinds, **read_positions_by_kind(theirs, kinds["layer_types"])}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json."""
        return {**super().write(config), **write_layer_kinds(config), **write_positions_by_kind(config)}


class Olmoe(Family):
    """A mixture in every layer, whose scores are not renormalised; no shared experts."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    constants: ClassVar[Json] = {"hidden_act": "silu", "attention_bias": False, "clip_qkv": None}
    parts: ClassVar[Json] = {"qk_norm": "full"}
    defaults: ClassVar[Json] = {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    }

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        experts = {"count": theirs["num_experts"], "top_k": theirs["num_experts_per_tok"]}
        return {**super().read(theirs), "experts": {**experts, "renormalise": bool(theirs["norm_topk_prob"])}}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json."""
        if config.heads * config.head_width != config.dim:
            raise ValueError(f"model.head_dim={config.head_width} has no place there (heads divide dim)")
        experts = config.experts
        return {
            **super().write(config),
            "intermediate_size": experts.ffn_dim or config.ffn_dim,
            "num_experts": experts.count,
            "num_experts_per_tok": experts.top_k,
            "norm_topk_prob": experts.renormalise,
        }
