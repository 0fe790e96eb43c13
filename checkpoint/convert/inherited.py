"""The tokenizer of a checkpoint that is made out of another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..files import Files
from .companions import COMPANIONS
from .hugging_face.tokenizer import find_tokenizer
from .tokenizer import Carried

KEPT = ("tokenizer", "end_of_document", "vocabulary")
"""Members of the state that go on."""


def inherit_tokenizer(files: Files, state: Mapping[str, Any]) -> Carried:
    """Return what a step and its state have of the tokenizer, its settings and chat template; no file where none is found."""
    found = find_tokenizer(files, state)
    places = [] if found is None else [found, *(found.parent / name for name in COMPANIONS)]
    beside = {place.name: place.read_bytes() for place in places if place.is_file()}
    return Carried({name: state[name] for name in KEPT if name in state}, beside)
