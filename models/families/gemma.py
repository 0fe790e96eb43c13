"""Gemma 2 and the text part of Gemma 3: norms of 1 + weight around each part, GeGLU, and a scaled embedding."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

from ..config import DecoderConfig
from .family import Family, Json
from .layer_kinds import read_layer_kinds, write_layer_kinds
from .positions import read_positions_by_kind, write_positions_by_kind


class Gemma2(Family):
    """Every second layer has a window; scores and logits are soft-capped."""

    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    constants: ClassVar[Json] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": None,
    }
    parts: ClassVar[Json] = {"norm": "rms_plus_one", "norm_place": "around", "ffn_activation": "gelu_tanh"}
    defaults: ClassVar[Json] = {
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    full_every: ClassVar[int] = 2

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        every = int(theirs.get("sliding_window_pattern") or self.full_every)
        return {
            **super().read(theirs),
            **read_layer_kinds(theirs, lambda layer: (layer + 1) % every != 0),
            "attention_scale": theirs["query_pre_attn_scalar"] ** -0.5,
            "attention_softcap": theirs.get("attn_logit_softcapping"),
            "logit_softcap": theirs.get("final_logit_softcapping"),
            "embedding_scale": math.sqrt(theirs["hidden_size"]),
        }

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json."""
        scalar = config.block(0).attention.scale ** -2
        return {
            **super().write(config),
            **write_layer_kinds(config),
            # Stored as a whole number, where it is one up to rounding.
            "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-12) else scalar,
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }


class Gemma3Text(Gemma2):
    """Five of six layers have a window and a theta of their own; norms of heads instead of soft-caps."""

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    constants: ClassVar[Json] = {**Gemma2.constants, "use_bidirectional_attention": False}
    parts: ClassVar[Json] = {**Gemma2.parts, "qk_norm": "head"}
    defaults: ClassVar[Json] = {
        **Gemma2.defaults,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    full_every = 6

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        read = super().read(theirs)
        return {**read, **read_positions_by_kind(theirs, read["layer_types"])}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json."""
        positions = write_positions_by_kind(config)
        local = positions["rope_parameters"]["sliding_attention"]["rope_theta"]
        return {**super().write(config), **positions, "rope_local_base_freq": local}


class Gemma3(Gemma3Text):
    """The files with pictures, too: their text part is read, and the rest is left behind. Exports are `gemma3_text`."""

    model_type = "gemma3"

    def stem(self, name: str, theirs: Json) -> str | None:
        """Return the name of a text model's weight. The language model's prefix changed between versions of transformers."""
        if re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", name):
            return None
        return re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name).removeprefix("language_model.")

    def from_hugging_face(self, theirs: Json) -> dict[str, Any]:
        """Read the keys of `model` from the part of config.json that describes the text model."""
        if not isinstance(theirs.get("text_config"), dict):
            raise ValueError("there is no text_config")
        outer = {key: theirs[key] for key in ("quantization_config", "tie_word_embeddings") if key in theirs}
        return super().from_hugging_face({**outer, **theirs["text_config"]})

    def to_hugging_face(self, config: DecoderConfig) -> dict[str, Any]:
        """Raise ValueError: there are no pictures to export."""
        raise ValueError("only the text part is here; export it as gemma3_text")
