"""Model families: for each, how Hugging Face's files name the weights and the shape of our decoder.

A family is a module with this interface; it needs neither torch nor an engine.
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

    names            our parameter names → Hugging Face's, of a decoder
    to_hugging_face  config.json of a decoder, without sizes of data; raises ValueError for one that the family has no place for
    from_hugging_face  the keys of `model` for a config.json; raises ValueError for what the decoder does not have
    """

    names: Callable[[DecoderConfig], dict[str, str]]
    to_hugging_face: Callable[[DecoderConfig], dict[str, Any]]
    from_hugging_face: Callable[[Mapping[str, Any]], dict[str, Any]]


FAMILIES = {"llama": Family(llama.names, llama.to_hugging_face, llama.from_hugging_face)}
"""By Hugging Face's `model_type`, which is also the `name` of our recipes' schema."""
