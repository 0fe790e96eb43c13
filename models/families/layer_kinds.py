"""Kinds of layers in a config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..config import DecoderConfig

_KINDS = {"full_attention": "full", "sliding_attention": "sliding"}


def read_layer_kinds(theirs: Mapping[str, Any], slides: Callable[[int], bool]) -> dict[str, Any]:
    """Read `layer_types` and `sliding_window`. Raises ValueError for a kind of layer that the decoder does not have.

    slides: whether a layer has a window, where the file does not say it
    """
    layers: int = theirs["num_hidden_layers"]
    said: Sequence[str] | None = theirs.get("layer_types")
    said = said or ["sliding_attention" if slides(layer) else "full_attention" for layer in range(layers)]
    if unknown := [kind for kind in said if kind not in _KINDS]:
        raise ValueError(f"layer_types has {unknown[0]!r}: the decoder has {', '.join(_KINDS)}")
    if len(said) != layers:
        raise ValueError(f"layer_types names {len(said)} layers, but num_hidden_layers={layers}")
    kinds = shortest_period([_KINDS[kind] for kind in said])
    return {"layer_types": kinds, "sliding_window": theirs.get("sliding_window") if "sliding" in kinds else None}


def write_layer_kinds(config: DecoderConfig) -> dict[str, Any]:
    """Return the two keys of a config.json. Raises ValueError for a kind of layer that it has no word for."""
    words = {ours: theirs for theirs, ours in _KINDS.items()}
    kinds = [config.layer_type(layer) for layer in range(config.layers)]
    if unknown := [kind for kind in kinds if kind not in words]:
        raise ValueError(f"model.layer_types has {unknown[0]!r}")
    return {"layer_types": [words[kind] for kind in kinds], "sliding_window": config.sliding_window}


def shortest_period(kinds: Sequence[str]) -> list[str]:
    """Return the shortest list that gives these kinds when it is repeated."""
    lengths = (length for length in range(1, len(kinds) + 1) if all(k == kinds[i % length] for i, k in enumerate(kinds)))
    return list(kinds[: next(lengths)])
