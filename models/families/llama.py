"""Llama 2 and 3, with scaled positions from 3.1 on."""

from __future__ import annotations

from typing import Any, ClassVar

from ..config import DecoderConfig
from .family import ACTIVATIONS, Family, Json


def read_activation(name: str) -> str:
    """Return our name of an activation. Raises ValueError for one that the decoder does not have."""
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act={name}: the decoder has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def write_activation(name: str) -> str:
    """Return Hugging Face's name of an activation. Raises ValueError for one that it has no name for."""
    known = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    if name not in known:
        raise ValueError(f"model.ffn_activation={name} has no place there")
    return known[name]


class Llama(Family):
    """The decoder's defaults, with biases where a file asks for them."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    defaults: ClassVar[Json] = {"hidden_act": "silu", "max_position_embeddings": 2048}

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        biased = bool(theirs.get("attention_bias"))
        biases = {"qkv_bias": biased, "output_bias": biased, "ffn_bias": bool(theirs.get("mlp_bias"))}
        return {**super().read(theirs), **biases, "ffn_activation": read_activation(theirs["hidden_act"])}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json."""
        biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.ffn_bias}
        return {**super().write(config), **biases, "hidden_act": write_activation(config.ffn_activation)}
