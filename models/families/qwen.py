"""Qwen 2, 2.5 and 3."""

from __future__ import annotations

from typing import Any, ClassVar

from ..config import DecoderConfig
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
