"""Types of the values in a config.json that families read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_SIZES = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"),
    *("head_dim", "max_position_embeddings", "original_max_position_embeddings", "no_rope_layer_interval"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_group", "topk_group"),
}
MOST = 10_000
"""Layers or experts, at most: more would take long to describe, only to be refused."""
_LISTED = {"num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts"}
_COUNTS = {
    *("sliding_window", "max_window_layers", "sliding_window_pattern", "n_shared_experts", "first_k_dense_replace"),
    "num_nextn_predict_layers",
}
_NUMBERS = {
    *("rms_norm_eps", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping", "factor", "low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "routed_scaling_factor"),
}
_SWITCHES = {"tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "truncate"}
_LISTS = {"layer_types", "no_rope_layers", "short_factor", "long_factor"}
_NODES = {"rope_scaling", "rope_parameters", "full_attention", "sliding_attention", "text_config", "quantization_config"}
_NEEDED = {"rms_norm_eps", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "query_pre_attn_scalar"}
"""Keys whose null stands for nothing."""


def type_faults(theirs: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Yield what has the wrong type in a config.json, or in a node of it, by key. Null stands for none, but not everywhere."""
    for key, value in theirs.items():
        name = f"{within}{key}"
        if value is None:
            if key in _NEEDED:
                yield f"{name} is null; write a number, or leave it out"
        elif key in _SIZES | _COUNTS:
            least = int(key in _SIZES)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                yield f"{name}={value!r} is no whole number from {least} on"
            elif key in _LISTED and value > MOST:
                yield f"{name}={value} is more than {MOST}"
        elif key in _NUMBERS and not _is_number(value):
            yield f"{name}={value!r} is no number"
        elif key in _SWITCHES and not isinstance(value, bool):
            yield f"{name}={value!r} is neither true nor false"
        elif key in _LISTS and not isinstance(value, list):
            yield f"{name}={value!r} is no list"
        elif key in _NODES:
            if not isinstance(value, Mapping):
                yield f"{name}={value!r} is no object with keys"
            else:
                yield from type_faults(value, f"{name}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
