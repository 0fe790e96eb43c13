"""Phi-3 and Phi-4: Llama, with queries, keys and values in one tensor, and gate and up in another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from ..config import DecoderConfig
from .family import Family, Json
from .names import StoredPart, StoredWeights

_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


class Phi3(Family):
    """A window in all layers, or in none; part of a head's width may rotate, and long contexts have factors by pair."""

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    constants: ClassVar[Json] = {"hidden_act": "silu"}
    defaults: ClassVar[Json] = {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 1.0,
        "sliding_window": None,
    }

    def stored_weights(self, config: DecoderConfig) -> StoredWeights:
        """Map a decoder's parameter names to rows of the files' tensors."""
        return {ours: (self._fused(part, config),) for ours, (part,) in super().stored_weights(config).items()}

    def _fused(self, part: StoredPart, config: DecoderConfig) -> StoredPart:
        *path, module, kind = part.name.split(".")
        if module not in _FUSED:
            return part
        return StoredPart(".".join((*path, _FUSED[module], kind)), dict(_rows(config))[module])

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        window = theirs["sliding_window"]
        share = (theirs.get("rope_parameters") or {}).get("partial_rotary_factor", theirs["partial_rotary_factor"])
        kinds = {"layer_types": ["full" if window is None else "sliding"], "sliding_window": window}
        return {**super().read(theirs), **kinds, "rope_fraction": share}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json, of which positions follow the rules of this family in transformers."""
        written = super().write(config)
        scaling = config.rope_scaling
        if scaling.kind not in ("none", "longrope"):
            raise ValueError(f"model.rope_scaling.kind={scaling.kind} has no place there")
        if scaling.kind == "longrope":
            if scaling.short_factor is None or scaling.long_factor is None or scaling.original_positions is None:
                raise ValueError("model.rope_scaling has only one of short_factor and long_factor")
            # The attention factor follows from the two lengths.
            original = scaling.original_positions
            lists = {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
            written |= {
                "rope_scaling": {"type": "longrope", **lists},
                "max_position_embeddings": round(scaling.factor * original),
                "original_max_position_embeddings": original,
                "rope_parameters": {"rope_type": "longrope", **lists, "rope_theta": config.rope_theta},
            }
        written["rope_parameters"]["partial_rotary_factor"] = config.rope_fraction
        return {**written, "partial_rotary_factor": config.rope_fraction, "sliding_window": config.sliding_window}


def _rows(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield their projection → its rows of the fused tensor."""
    queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
    yield "q_proj", (0, queries)
    yield "k_proj", (queries, queries + keys)
    yield "v_proj", (queries + keys, queries + 2 * keys)
    yield "gate_proj", (0, config.ffn_dim)
    yield "up_proj", (config.ffn_dim, 2 * config.ffn_dim)
