"""Qwen 2, 2.5 and 3, and Qwen 3's mixtures of experts."""

from __future__ import annotations

from typing import Any, ClassVar

from ..config import DecoderConfig
from .experts import layers_with_experts
from .family import Family, Json
from .layer_kinds import read_layer_kinds, write_layer_kinds


class Qwen2(Family):
    """Biases of queries, keys and values; windows in the layers from `max_window_layers` on, where they are used."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    constants: ClassVar[Json] = {"hidden_act": "silu"}
    parts: ClassVar[Json] = {"qkv_bias": True}
    defaults: ClassVar[Json] = {"max_position_embeddings": 32_768, "sliding_window": 4096, "max_window_layers": 28}

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        used = bool(theirs.get("use_sliding_window")) and theirs["sliding_window"] is not None
        kinds = theirs if used else {**theirs, "sliding_window": None, "layer_types": None}
        return {**super().read(theirs), **read_layer_kinds(kinds, lambda layer: used and layer >= theirs["max_window_layers"])}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json."""
        kinds = write_layer_kinds(config)
        first = next((i for i, kind in enumerate(kinds["layer_types"]) if kind == "sliding_attention"), config.layers)
        windows = {"use_sliding_window": config.sliding_window is not None, "max_window_layers": first}
        return {**super().write(config), **kinds, **windows}


class Qwen3(Qwen2):
    """Norms of each head's queries and keys instead of biases, and a head width of its own."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    parts: ClassVar[Json] = {"qk_norm": "head"}
    defaults: ClassVar[Json] = {**Qwen2.defaults, "head_dim": 128}

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        biased = bool(theirs.get("attention_bias"))
        return {**super().read(theirs), "qkv_bias": biased, "output_bias": biased}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json."""
        return {**super().write(config), "attention_bias": config.qkv_bias}


class Qwen3Moe(Qwen3):
    """A mixture in each layer that is not named as dense; narrow experts without shared ones."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    defaults: ClassVar[Json] = {
        **Qwen3.defaults,
        "head_dim": None,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    }

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        layers, step, dense = theirs["num_hidden_layers"], theirs["decoder_sparse_step"], theirs["mlp_only_layers"] or ()
        mixed = [layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0]
        experts = {
            "count": theirs.get("num_local_experts", theirs["num_experts"]),
            "top_k": theirs["num_experts_per_tok"],
            "ffn_dim": theirs["moe_intermediate_size"],
            "renormalise": bool(theirs["norm_topk_prob"]),
            **layers_with_experts(mixed, layers),
        }
        return {**super().read(theirs), "experts": experts}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json."""
        experts = config.experts
        return {
            **super().write(config),
            "num_experts": experts.count,
            "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": experts.ffn_dim or config.ffn_dim,
            "norm_topk_prob": experts.renormalise,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(config.layers) if not experts.has_mixture(layer)],
        }
