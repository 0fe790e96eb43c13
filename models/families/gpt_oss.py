"""gpt-oss: biases, sinks, windows in every other layer, and experts that are stacked in the files, gate and up in turns."""

from __future__ import annotations

from typing import Any, ClassVar

from ..config import DecoderConfig
from .family import Family, Json
from .layer_kinds import read_layer_kinds, write_layer_kinds
from .names import StoredPart, StoredWeights


class GptOss(Family):
    """The softmax is over the chosen experts' logits, as renormalised scores are."""

    model_type = "gpt_oss"
    architecture = "GptOssForCausalLM"
    constants: ClassVar[Json] = {"hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    parts: ClassVar[Json] = {"sinks": True, "ffn_activation": "clamped_swiglu", "ffn_bias": True}
    defaults: ClassVar[Json] = {
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "sliding_window": 128,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    }

    def stored_weights(self, config: DecoderConfig) -> StoredWeights:
        """Map a decoder's parameter names to rows of the files' tensors, whose matrices of experts are transposed."""
        found = super().stored_weights(config)
        for layer in config.mixture_layers():
            ours, theirs = f"layers.{layer}.ffn", f"model.layers.{layer}.mlp"
            found[f"{ours}.router.weight"] = (StoredPart(f"{theirs}.router.weight"),)
            found[f"{ours}.router.logit_bias"] = (StoredPart(f"{theirs}.router.bias"),)
            for number, first, name in ((1, 0, "gate_up_proj"), (3, 1, "gate_up_proj"), (2, None, "down_proj")):
                rows = None if first is None else (first, 2 * (config.experts.ffn_dim or config.ffn_dim))
                step = 1 if first is None else 2
                for own, tensor, transposed in (("w", name, True), ("b", f"{name}_bias", False)):
                    found[f"{ours}.experts.{own}{number}"] = tuple(
                        StoredPart(f"{theirs}.experts.{tensor}", rows, step, (expert,), transposed)
                        for expert in range(config.experts.count)
                    )
        return found

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        biased = bool(theirs["attention_bias"])
        chosen = theirs.get("experts_per_token", theirs["num_experts_per_tok"])
        return {
            **super().read(theirs),
            **read_layer_kinds(theirs, lambda layer: layer % 2 == 0),
            "qkv_bias": biased,
            "output_bias": biased,
            "experts": {"count": theirs["num_local_experts"], "top_k": chosen, "logit_bias": True},
        }

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json."""
        experts = config.experts
        return {
            **super().write(config),
            **write_layer_kinds(config),
            "attention_bias": config.qkv_bias,
            "intermediate_size": experts.ffn_dim or config.ffn_dim,
            "num_local_experts": experts.count,
            "num_experts_per_tok": experts.top_k,
        }
