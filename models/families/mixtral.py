"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any, ClassVar

from ..config import DecoderConfig
from .family import Json
from .mistral import Mistral
from .names import MixtureNames


class Mixtral(Mistral):
    """The chosen experts' softmax scores are renormalised."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    constants: ClassVar[Json] = {**Mistral.constants, "router_jitter_noise": 0.0}
    defaults: ClassVar[Json] = {
        **Mistral.defaults,
        "sliding_window": None,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    mixture: ClassVar[MixtureNames] = MixtureNames(
        "block_sparse_moe.gate.weight", experts="block_sparse_moe.experts", gate="w1", down="w2", up="w3"
    )

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`."""
        return {
            **super().read(theirs),
            "experts": {"count": theirs["num_local_experts"], "top_k": theirs["num_experts_per_tok"]},
        }

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json."""
        experts = config.experts
        return {
            **super().write(config),
            "intermediate_size": experts.ffn_dim or config.ffn_dim,
            "num_local_experts": experts.count,
            "num_experts_per_tok": experts.top_k,
        }
