"""Rotary positions in a config.json: read from the keys of transformers 4 and 5, written for both.

Version 4 has `rope_theta` and `rope_scaling`; version 5 has `rope_parameters`, which may be one for each kind of layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import DecoderConfig
from ..rope_config import RopeScaling

_KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn", "longrope": "longrope", "su": "longrope"}
"""Their `rope_type` → our kind."""

_NAMES = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_positions",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_positions",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "attention_factor": "attention_factor",
    },
    "longrope": {
        "factor": "factor",
        "original_max_position_embeddings": "original_positions",
        "short_factor": "short_factor",
        "long_factor": "long_factor",
        "attention_factor": "attention_factor",
    },
}
"""Kind → their key → our field of `rope_scaling`."""


def read_positions(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Read `rope_theta` and `rope_scaling`, which are those of all layers.

    Raises ValueError for a kind of scaling that the decoder does not have.
    """
    return _read(theirs, scales_sliding=True)


def read_positions_by_kind(theirs: Mapping[str, Any], layer_types: Sequence[str]) -> dict[str, Any]:
    """Read positions where layers with a window are never scaled, and may have a theta of their own.

    layer_types: ours. Raises ValueError for a kind of scaling that the decoder does not have.
    """
    read = _read(theirs, scales_sliding=False)
    newest: dict[str, Any] = (theirs.get("rope_parameters") or {}).get("sliding_attention") or {}
    kind = newest.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rope_parameters.sliding_attention.rope_type={kind}: layers with a window aren't scaled here")
    theta = float(newest.get("rope_theta", theirs.get("rope_local_base_freq", read["rope_theta"])))
    own = "sliding" in layer_types and theta != read["rope_theta"]
    return {**read, "rope_theta_sliding": theta if own else None}


def _read(theirs: Mapping[str, Any], *, scales_sliding: bool) -> dict[str, Any]:
    said: dict[str, Any] = theirs.get("rope_parameters") or {}
    newest: dict[str, Any] = said.get("full_attention", said)
    scaling: dict[str, Any] = theirs.get("rope_scaling") or newest
    theta = float(newest.get("rope_theta", theirs["rope_theta"]))
    name = str(scaling.get("rope_type", scaling.get("type", "default")))
    kind = _KINDS.get(name)
    if kind is None:
        raise ValueError(f"rope_scaling.rope_type={name}: the decoder has {', '.join(_KINDS)}")
    fields: dict[str, Any] = {"kind": kind}
    for key, ours in _NAMES.get(kind, {}).items():
        if scaling.get(key) is not None:
            fields[ours] = scaling[key]
    if kind in ("llama3", "yarn", "longrope"):
        original = theirs.get("original_max_position_embeddings") or fields.get("original_positions")
        fields["original_positions"] = original or theirs.get("max_position_embeddings")
    if kind == "longrope":
        fields["long"] = False  # transformers chooses by a sequence's length
        if theirs.get("original_max_position_embeddings") or "factor" not in fields:
            fields["factor"] = max(theirs["max_position_embeddings"] / fields["original_positions"], 1.0)
    if kind != "none":
        fields["sliding"] = scales_sliding
    return {"rope_theta": theta, "rope_scaling": dataclasses.asdict(RopeScaling(**fields))}


def write_positions(config: DecoderConfig) -> dict[str, Any]:
    """Return the keys of a config.json, in which all layers have the same positions."""
    scaling = write_scaling(config.rope_scaling)
    newest = {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": newest}


def write_positions_by_kind(config: DecoderConfig) -> dict[str, Any]:
    """Return the keys of a config.json in which layers with a window are never scaled and may have their own theta."""
    scaling = write_scaling(config.rope_scaling)
    theta = config.rope_theta if config.rope_theta_sliding is None else config.rope_theta_sliding
    newest = {
        "full_attention": {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": theta},
    }
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": newest}


def write_scaling(scaling: RopeScaling) -> dict[str, Any] | None:
    """Return `rope_scaling` of a config.json; None without scaling. Fields that are not set are left out."""
    if scaling.kind == "none":
        return None
    values = {key: getattr(scaling, ours) for key, ours in _NAMES[scaling.kind].items()}
    return {"rope_type": scaling.kind, **{key: value for key, value in values.items() if value is not None}}
