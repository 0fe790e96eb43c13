"""The settings beside a tokenizer's file: its special tokens and its chat template. Imports no torch.

A run copies them into its folder, so that a run and its checkpoints agree on the token that begins a text.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..checkpoint.convert.companions import COMPANIONS
from ..config.cache import expand_user
from ..data.documents.chat import MADE, ChatTemplate
from ..data.tokenizing.tokenizer import Tokenizer


def settings_folder(tokenizer: str | None, otherwise: Path | None = None) -> Path | None:
    """Return the folder of the tokenizer's file that `data.tokenizer` names; `otherwise` where there are no settings."""
    if tokenizer is None or tokenizer in MADE:
        return otherwise
    place = expand_user(tokenizer)
    folder = place if place.is_dir() else place.parent
    return folder if any((folder / name).is_file() for name in COMPANIONS) else otherwise


def copy_settings(source: Path | None, folder: Path) -> None:
    """Copy the settings of a tokenizer into a run's folder, where `generate`, `evaluate` and an export find them."""
    if source is None or source.resolve() == folder.resolve():
        return
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def beginning_token(tokenizer: Tokenizer, settings: Path | None) -> int | None:
    """Return the id of the token that begins a text, by the settings in a folder; None where they name none."""
    if settings is None:
        return None
    return tokenizer.token_id(ChatTemplate.find(None, str(settings)).names.get("bos_token", ""))
