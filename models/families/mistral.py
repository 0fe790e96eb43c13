"""Mistral 7B and its successors of the same architecture: Llama, in the first version with a window in every layer."""

from __future__ import annotations

from typing import Any, ClassVar

from ..config import DecoderConfig
from .family import Family, Json


class Mistral(Family):
    """A window in all layers, or in none."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    constants: ClassVar[Json] = {"hidden_act": "silu"}
    defaults: ClassVar[Json] = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        window = theirs["sliding_window"]
        kinds = {"layer_types": ["full" if window is None else "sliding"], "sliding_window": window}
        return {**super().read(theirs), **kinds}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json."""
        return {**super().write(config), "sliding_window": config.sliding_window}
