"""The tokenizer of an imported model: it lies in the step's folder, and the state has its fingerprint, as an own run's."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.tokenizing.tokenizer import Tokenizer
from ..errors import CheckpointError
from .companions import COMPANIONS, SETTINGS, TOKENIZER

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Carried:
    """An import's part of its tokenizer. state: members of the checkpoint's state; files: name → contents, for its folder."""

    state: dict[str, Any] = field(default_factory=dict[str, Any])
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])


def carry_tokenizer(source: Path, given: Path | None = None) -> Carried:
    """Read the tokenizer of a model's folder, or the one that is given. Nothing, with a warning, where there is none.

    Raises CheckpointError for a given one that can't be read.
    """
    place = source if given is None else given
    file = place / TOKENIZER if place.is_dir() else place
    if not file.is_file():
        if given is not None:
            raise CheckpointError(f"{file}: there is no tokenizer.json")
        log.warning(
            "%s has no tokenizer.json: nothing will tell whether a run's tokens are the model's; give --tokenizer", source
        )
        return Carried()
    end: str | None = None
    try:
        tokenizer = Tokenizer.load(file)
    except ValueError as error:  # none of the well-known ends
        end = _end_of_sequence(file.parent)
        try:
            if end is None:
                raise
            tokenizer = Tokenizer.load(file, end)
        except ValueError:
            if given is not None:
                raise CheckpointError(str(error)) from error
            log.warning("the tokenizer is left behind: %s", error)
            return Carried()
    state: dict[str, Any] = {"tokenizer": tokenizer.fingerprint, "end_of_document": end}
    beside = [file.parent / name for name in COMPANIONS]
    return Carried(state, {each.name: each.read_bytes() for each in (file, *beside) if each.is_file()})


def _end_of_sequence(folder: Path) -> str | None:
    """Return the token that a model's folder names as the end of a sequence."""
    try:
        end: Any = json.loads((folder / SETTINGS).read_text()).get("eos_token")
    except (OSError, ValueError):
        return None
    return end.get("content") if isinstance(end, dict) else end
