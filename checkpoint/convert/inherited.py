"""The tokenizer of a checkpoint that is made out of another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..files import Files
from .hugging_face.tokenizer import find_tokenizer
from .tokenizer import TOKENIZER, Carried

KEPT = ("tokenizer", "end_of_document", "vocabulary")
"""Members of the state that go on."""


def inherit_tokenizer(files: Files, state: Mapping[str, Any]) -> Carried:
    """Return what a step and its state have of the tokenizer; no file where none is found."""
    found = find_tokenizer(files, state)
    beside = {} if found is None else {TOKENIZER: found.read_bytes()}
    return Carried({name: state[name] for name in KEPT if name in state}, beside)
