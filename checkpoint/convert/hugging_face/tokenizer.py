"""The tokenizer and the special tokens of a model's folder in the Hugging Face layout."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....data.tokenizing.tokenizer import Tokenizer
from ...errors import CheckpointError
from ...files import Files, LocalFiles
from ..companions import COMPANIONS, SETTINGS, TOKENIZER

log = logging.getLogger(__name__)

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def find_tokenizer(files: Files, state: Mapping[str, Any]) -> Path | None:
    """Return the tokenizer.json in a step's folder or its run's, if it is the one that the step was trained with."""
    if not isinstance(files, LocalFiles):
        return None
    step = files.path.resolve()
    for folder in (step, step.parent, step.parent.parent):
        file = folder / TOKENIZER
        if not file.is_file():
            continue
        try:
            found = Tokenizer.load(file, state.get("end_of_document"))
        except ValueError as error:
            log.warning("the tokenizer is left out: %s", error)
            return None
        if state.get("tokenizer") in (None, found.fingerprint):
            return file
        log.warning("%s is not the tokenizer that the model was trained with, and is left out; give --tokenizer", file)
        return None
    log.warning("there is no tokenizer.json beside %s: AutoTokenizer will find none; give --tokenizer", step)
    return None


def imported_config(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json that a model was imported with, that of its text part on top; empty for a run's own."""
    theirs: dict[str, Any] = (state.get("imported_from") or {}).get("config") or {}
    return {**theirs, **(theirs.get("text_config") or {})}


def special_tokens(state: Mapping[str, Any], tokenizer: Path | None) -> dict[str, Any]:
    """Return the ids of special tokens as config.json has them: those of the model that was imported, or the run's.

    All are there, null where there is none: what is left out, transformers fills in with ids of Llama 2's.
    """
    theirs = imported_config(state)
    if theirs:
        return {key: theirs.get(key) for key in SPECIAL}
    end = state.get("end_of_document")
    if not isinstance(end, int) and tokenizer is not None:
        try:
            end = Tokenizer.load(tokenizer, end).end_of_document
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    return {**dict.fromkeys(SPECIAL), "eos_token_id": end if isinstance(end, int) else None}


def write_generation_config(folder: Path, state: Mapping[str, Any], special: Mapping[str, Any]) -> None:
    """Write what `generate` of transformers reads: the import's own settings, and the ids of special tokens."""
    theirs: dict[str, Any] = (state.get("imported_from") or {}).get("generation_config") or {}
    ids = {key: value for key, value in special.items() if value is not None and key not in theirs}
    (folder / "generation_config.json").write_text(json.dumps(theirs | ids, indent=2) + "\n")


def copy_tokenizer(source: Path, folder: Path, end: Any) -> None:
    """Copy a tokenizer.json with its settings, or settings that name the end of a sequence.

    end: the id of that token, or several
    """
    shutil.copyfile(source, folder / TOKENIZER)
    for name in COMPANIONS:
        if (source.parent / name).is_file():
            shutil.copyfile(source.parent / name, folder / name)
    if (folder / SETTINGS).is_file():
        return
    first = end[0] if isinstance(end, list) and end else end
    names = {entry["id"]: entry["content"] for entry in json.loads(source.read_text()).get("added_tokens", [])}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if first in names:
        config["eos_token"] = names[first]
    (folder / SETTINGS).write_text(json.dumps(config, indent=2) + "\n")
