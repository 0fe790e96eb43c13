"""Sizes of a decoder, told by the shapes of its stored weights. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .config import DecoderConfig

_LAYER = re.compile(r"layers\.(\d+)\.")


def stored_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return key of `model` → value, as far as the shapes of a decoder's weights tell; empty for other names.

    shapes: parameter's name → shape
    """
    embedding = shapes.get("embed.weight")
    layers = [int(found.group(1)) for name in shapes if (found := _LAYER.match(name))]
    if embedding is None or not layers:
        return {}
    sizes: dict[str, Any] = {
        "dim": embedding[1],
        "layers": max(layers) + 1,
        "vocabulary": embedding[0],
        "tied": "head.weight" not in shapes,
    }
    inner = shapes.get("layers.0.ffn.w1.weight")
    return sizes if inner is None else {**sizes, "ffn_dim": inner[0]}


def wrong_head_share(shapes: Mapping[str, tuple[int, ...]], config: DecoderConfig) -> str | None:
    """Return how many query rows the stored weights have for each key row, if the config says otherwise; else None."""
    queries, keys = shapes.get("layers.0.attention.wq.weight"), shapes.get("layers.0.attention.wk.weight")
    if queries is None or keys is None or queries[0] * config.kv_heads == keys[0] * config.heads:
        return None
    return f"{queries[0]} to {keys[0]}"
