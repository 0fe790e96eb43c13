"""Mixtures of experts in a config.json, as far as families have them in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..config import DecoderConfig
from ..mixture.config import ExpertsConfig


def acting_experts(config: DecoderConfig) -> dict[str, Any]:
    """Return the keys that decide what the mixtures compute, as `experts.…`, with values that leave nothing to be derived."""
    experts, layers = config.experts, config.mixture_layers()
    values: dict[str, Any] = {"experts.count": len(layers) and experts.count}
    if layers:
        told = {each.name: getattr(experts, each.name) for each in dataclasses.fields(ExpertsConfig)}
        told |= {"ffn_dim": experts.ffn_dim or config.ffn_dim, "layers": layers, "dense_layers": 0}
        if experts.top_groups == experts.groups:
            told |= {"groups": 1, "top_groups": 1}
        if not experts.carried_dim:
            told["state_dim"] = None  # of no router
        values = {f"experts.{name}": value for name, value in told.items()}
    if len(layers) == config.layers:
        values["ffn_dim"] = None  # of no layer
    return values


def layers_with_experts(layers: Sequence[int], count: int) -> dict[str, Any]:
    """Return the keys of `model.experts` that name the layers. count: of the model's layers"""
    first = count - len(layers)
    if list(layers) == list(range(first, count)):
        return {"dense_layers": first}
    return {"layers": list(layers)}
