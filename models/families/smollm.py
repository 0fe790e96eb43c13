"""SmolLM3: Llama, in which every fourth layer has no positions."""

from __future__ import annotations

from typing import Any, ClassVar

from ..config import DecoderConfig
from .family import Family, Json
from .layer_kinds import shortest_period


class SmolLM3(Family):
    """Layers with positions, and without."""

    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    constants: ClassVar[Json] = {"hidden_act": "silu", "use_sliding_window": False}
    defaults: ClassVar[Json] = {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    }

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        every, layers = theirs["no_rope_layer_interval"], range(theirs["num_hidden_layers"])
        turns = theirs.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in layers]
        if len(turns) != len(layers):
            raise ValueError(f"no_rope_layers names {len(turns)} layers, but num_hidden_layers={len(layers)}")
        biased = bool(theirs.get("attention_bias"))
        return {
            **super().read(theirs),
            "layer_types": shortest_period(["full" if turning else "nope" for turning in turns]),
            "qkv_bias": biased,
            "output_bias": biased,
            "ffn_bias": bool(theirs.get("mlp_bias")),
        }

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json."""
        kinds = [config.layer_type(layer) for layer in range(config.layers)]
        if "sliding" in kinds:
            raise ValueError("model.layer_types has 'sliding'")
        return {
            **super().write(config),
            "no_rope_layers": [int(kind == "full") for kind in kinds],
            "layer_types": ["full_attention"] * config.layers,
            "attention_bias": config.qkv_bias,
            "mlp_bias": config.ffn_bias,
        }
