"""Files of the Hugging Face model that a run began from, kept for an export. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.convert.companions import TOKENIZER
from ..checkpoint.files import hugging_face_folder, is_remote
from ..checkpoint.folder import step_name
from ..checkpoint.manifest import Manifest

_KEPT = ("format", "config", "generation_config")


@dataclass(frozen=True)
class ImportedModel:
    """The family, positions and special tokens of a model, as its files said them, and its tokenizer's settings.

    said       members of `imported_from` in a checkpoint's state; every checkpoint of the run has them
    tokenizer  the folder that the tokenizer and its settings are in; None: there is none
    """

    said: Mapping[str, Any]
    tokenizer: Path | None


def imported_model(checkpoint: Path | str, manifest: Manifest) -> ImportedModel | None:
    """Return what a checkpoint says of the Hugging Face model that its weights come from; None: they come from none."""
    said: Mapping[str, Any] = manifest.state.get("imported_from") or {}
    if said.get("format") != "hugging_face":
        return None
    return ImportedModel({name: said[name] for name in _KEPT if name in said}, _tokenizer(checkpoint, manifest))


def _tokenizer(checkpoint: Path | str, manifest: Manifest) -> Path | None:
    if is_remote(str(checkpoint)) or manifest.state.get("tokenizer") is None:
        return None
    foreign = hugging_face_folder(checkpoint)
    step = Path(checkpoint) if foreign is None else foreign
    places = [step, step / step_name(manifest.step), *((step.parent, step.parent.parent) if foreign is None else ())]
    return next((place for place in places if (place / TOKENIZER).is_file()), None)
