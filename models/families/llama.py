"""Llama in Hugging Face's files. The rotary convention is the same (rotate half), so only the weights' names differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from ..config import DecoderConfig

_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.w1.weight": "mlp.gate_proj.weight",
    "ffn.w2.weight": "mlp.down_proj.weight",
    "ffn.w3.weight": "mlp.up_proj.weight",
}
_OUTER = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


_KEYS = {
    *("_target_", "name", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim", "vocabulary", "tied"),
    *("norm_eps", "rope_theta", "init_std", "z_loss", "mup_base", "mup_embedding", "mup_residual"),
}
"""Keys that a config.json says, or that only training reads."""


def _default(field: Field[Any]) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def names(config: DecoderConfig) -> dict[str, str]:
    """Map our parameter names to Hugging Face's. A tied head is stored once, as the embedding."""
    found = {ours: theirs for ours, theirs in _OUTER.items() if not (config.tied and ours == "head.weight")}
    for layer in range(config.layers):
        found |= {f"layers.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in _BLOCK.items()}
    return found


def to_hugging_face(config: DecoderConfig) -> dict[str, Any]:
    """Return a decoder's config.json. Raises ValueError for parts that Hugging Face's Llama does not have."""
    if config.mup_base or config.mup_embedding != 1.0 or config.mup_residual != 1.0:
        raise ValueError("Hugging Face's Llama has no place for muP's multipliers (model.mup_…)")
    changed = (each.name for each in fields(config) if getattr(config, each.name) != _default(each))
    if others := [name for name in changed if name not in _KEYS]:
        raise ValueError(f"Hugging Face's Llama has no place for model.{others[0]}={getattr(config, others[0])}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "vocab_size": config.known_vocabulary,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def from_hugging_face(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Read the keys of `model` from a config.json. Raises ValueError for what the decoder does not have."""
    rope: dict[str, Any] = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    heads = theirs["num_attention_heads"]
    unknown = [
        (kind != "default", f"rotary scaling {kind!r}"),
        (theirs.get("attention_bias") or theirs.get("mlp_bias"), "biases"),
        (theirs.get("hidden_act", "silu") != "silu", f"activation {theirs.get('hidden_act')!r}"),
        (theirs.get("head_dim", theirs["hidden_size"] // heads) * heads != theirs["hidden_size"], "a head width of its own"),
    ]
    for wrong, what in unknown:
        if wrong:
            raise ValueError(f"{what} is something Meshloom's Llama does not have")
    return {
        "_target_": "meshloom.models.decoder.Decoder",
        "name": "llama",
        "dim": theirs["hidden_size"],
        "layers": theirs["num_hidden_layers"],
        "heads": heads,
        "kv_heads": theirs.get("num_key_value_heads", heads),
        "ffn_dim": theirs["intermediate_size"],
        "vocabulary": theirs["vocab_size"],
        "tied": bool(theirs.get("tie_word_embeddings", False)),
        "norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "rope_theta": float(rope.get("rope_theta", theirs.get("rope_theta", 10_000.0))),
    }
