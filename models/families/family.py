"""A family of Hugging Face's models: its config.json and the names of its weights, for a decoder and back.

A family says how it reads and writes a config.json. Whether it can express a decoder follows from the two: it can if reading
what was written gives the same decoder. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from ..config import DECODER, DecoderConfig, decoder_config
from ..rope_config import RopeScaling
from .experts import acting_experts
from .json_types import type_faults
from .names import MixtureNames, StoredWeights, stored_weights
from .positions import read_positions, write_positions

Json = Mapping[str, Any]

SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "ffn_dim",
    "vocab_size": "vocabulary",
    "rms_norm_eps": "norm_eps",
    "head_dim": "head_dim",
    "tie_word_embeddings": "tied",
}
"""Keys of config.json that every family has → ours."""

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
"""Their name of an activation → ours."""

_NOT_COMPUTED = {"_target_", "name", "experts", "init_std", "z_loss", "mup_base", "mup_embedding", "mup_residual"}
"""Keys of `model` that a file of weights need not tell."""

_SCALING = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_positions", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_positions", "beta_fast", "beta_slow", "truncate", "angle_factor"),
    "longrope": ("original_positions", "short_factor", "long_factor", "angle_factor"),
}
"""Kind of scaling → what of it is told by a file."""


class Family:
    """One architecture of Hugging Face's. Subclasses extend `read` and `write`.

    model_type    of config.json
    architecture  the class in transformers
    defaults      key of config.json → its value where a file leaves it out
    constants     key of config.json → the only value with which the decoder computes the same
    parts         key of `model` → its value in all models of the family
    mixture       names of the weights of a mixture of experts
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    defaults: ClassVar[Json] = {}
    constants: ClassVar[Json] = {}
    parts: ClassVar[Json] = {}
    mixture: ClassVar[MixtureNames] = MixtureNames()

    def stored_weights(self, config: DecoderConfig) -> StoredWeights:
        """Map the names of a decoder's parameters and saved buffers to their parts in the files."""
        return stored_weights(config, self.mixture)

    def stem(self, name: str, theirs: Json) -> str | None:
        """Return a weight's name in the files of a text model, or None for a weight that is left behind. theirs: config.json"""
        return name

    def read(self, theirs: Json) -> dict[str, Any]:
        """Return keys of `model`. theirs: a config.json with the defaults filled in. Raises ValueError, naming the key."""
        sizes = {ours: theirs.get(key) for key, ours in SIZES.items()}
        sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
        return {**sizes, "tied": bool(sizes["tied"]), **read_positions(theirs)}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Return keys of config.json. Raises ValueError for what there is no key for."""
        sizes = {key: getattr(config, ours) for key, ours in SIZES.items()}
        sizes |= {"vocab_size": config.known_vocabulary, "head_dim": config.head_width}
        return {**sizes, **write_positions(config)}

    def from_hugging_face(self, theirs: Json) -> dict[str, Any]:
        """Read the keys of `model` from a config.json. Raises ValueError for what the decoder does not have, by its key."""
        if faults := list(type_faults(theirs)):
            raise ValueError("; ".join(faults))
        said: dict[str, Any] = {
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            **self.defaults,
            **theirs,
        }
        quantised: Json = said.get("quantization_config") or {}
        how = quantised.get("quant_method", "some")
        if quantised and how != "mxfp4" and not (how == "fp8" and _is_block(quantised.get("weight_block_size"))):
            raise ValueError(f"quantization_config: weights of {how} quantisation can't be read; convert them to bf16 first")
        for key, value in self.constants.items():
            if said.get(key, value) != value:
                raise ValueError(f"{key}={said[key]}: the decoder computes this family with {key}={value} only")
        model = {"_target_": DECODER, "name": "llama", **self.parts, **self.read(said)}
        for key, ours in SIZES.items():
            if ours != "head_dim" and model[ours] is None:
                raise ValueError(f"there is no {key}")
        if problems := decoder_config(model).problems():
            raise ValueError("; ".join(f"{each.key} {each.message}" for each in problems))
        return model

    def to_hugging_face(self, config: DecoderConfig) -> dict[str, Any]:
        """Return a decoder's config.json. Raises ValueError, naming the key, for a decoder that the family can't express."""
        if config.mup_base or config.mup_embedding != 1.0 or config.mup_residual != 1.0:
            raise ValueError("muP's multipliers (model.mup_…) have no place there")
        described = self.described(config)
        ours, back = acting_keys(config), acting_keys(decoder_config(self.from_hugging_face(described)))
        for key, value in ours.items():
            if not _same(value, back[key]):
                raise ValueError(f"model.{key}={value} has no place there (it would be read as {back[key]})")
        return described

    def described(self, config: DecoderConfig) -> dict[str, Any]:
        """Return a config.json of a decoder whose parts may be more than the family has."""
        kind = {"architectures": [self.architecture], "model_type": self.model_type}
        return {**kind, **self.constants, **self.write(config)}


def _is_block(size: Any) -> bool:
    """Return whether this is a number of rows and one of columns."""
    return isinstance(size, list) and len(size) == 2 and all(isinstance(each, int) and each > 0 for each in size)


def acting_keys(config: DecoderConfig) -> dict[str, Any]:
    """Return the keys that decide what a decoder computes, with values that leave nothing to be derived."""
    slides = "sliding" in config.layer_types
    values = {each.name: getattr(config, each.name) for each in dataclasses.fields(config) if each.name not in _NOT_COMPUTED}
    theta = config.rope_theta if config.rope_theta_sliding is None else config.rope_theta_sliding
    return values | {
        "vocabulary": config.known_vocabulary,
        "head_dim": config.head_width,
        "layer_types": [config.layer_type(layer) for layer in range(config.layers)],
        "attention_scale": config.block(0).attention.scale,
        "rope_theta_sliding": theta if slides else None,
        "rope_scaling": _acting_scaling(config.rope_scaling, slides),
        **acting_experts(config),
    }


def _acting_scaling(scaling: RopeScaling, slides: bool) -> dict[str, Any]:
    told = (*_SCALING[scaling.kind], *(("sliding",) if slides and scaling.kind != "none" else ()))
    return {"kind": scaling.kind, **{name: getattr(scaling, name) for name in told}}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-12)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)
