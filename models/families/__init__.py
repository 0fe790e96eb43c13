"""Model families: the names that Hugging Face's files use for our decoder's weights and config keys.

A family is a module of these functions. It imports neither torch nor an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import DecoderConfig
from . import llama


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's, by its `model_type`.

    names            maps a decoder's parameter names to Hugging Face's
    to_hugging_face  returns a decoder's config.json, without sizes of data; raises ValueError for one it can't express
    from_hugging_face  returns the keys of `model` for a config.json; raises ValueError for what the decoder does not have
    """

    names: Callable[[DecoderConfig], dict[str, str]]
    to_hugging_face: Callable[[DecoderConfig], dict[str, Any]]
    from_hugging_face: Callable[[Mapping[str, Any]], dict[str, Any]]


FAMILIES = {"llama": Family(llama.names, llama.to_hugging_face, llama.from_hugging_face)}
"""By Hugging Face's `model_type`, which is also the `name` of our recipes' schema."""
