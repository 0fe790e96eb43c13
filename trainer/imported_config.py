"""Config of a run that begins from an import: its model is the import's, everything else today's."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf, open_dict

from ..config.compose import Composition
from ..config.problems import ConfigError, Problem
from ..config.structured import literal
from ..data.config import TRAINED
from .resumed_config import Resumed, saved_config, typed_values
from .saved_classes import refuse_unnamed_classes
from .typed import option_of


def import_config(
    state: Mapping[str, Any], fresh: Composition, overrides: Iterable[str], tokenizer: Path | None = None
) -> Resumed:
    """Return the config of a run that begins from an import.

    The keys of `model` are the import's where nothing is typed. A typed model is compared with the import's later
    (`checkpoint_fit.py`); sizes that it leaves open are the import's. Text is cut by the import's tokenizer, where a new one
    would be trained.

    tokenizer: the import's, if it has one
    """
    typed = typed_values(overrides)
    config, told = copy.deepcopy(fresh.config), list[str]()
    saved = saved_config(state).get("model")
    if isinstance(saved, dict) and option_of("model", saved) is not None:
        refuse_unnamed_classes({"model": saved}, {})
        today = cast(dict[str, Any], OmegaConf.to_container(fresh.config.model, resolve=True, throw_on_missing=False))
        node = _model(cast(dict[str, Any], saved), today, typed)
        with open_dict(config):
            config["model"] = OmegaConf.create(literal(node))
        told += _taken(today, node)
    if tokenizer is not None and config.data.get("tokenizer") == TRAINED and "data.tokenizer" not in typed:
        config.data.tokenizer = literal(str(tokenizer))
        if config.data.get("end_of_document") is None:
            config.data.end_of_document = literal(_token_name(tokenizer, state.get("end_of_document")))
        told.append(f"taken from the imported checkpoint: data.tokenizer={tokenizer}")
    return Resumed(config, told, choices=fresh.choices)


def _token_name(tokenizer: Path | str, token: str | int | None) -> str | None:
    """Return the name of a token, which checkpoints of our own runs know by its id."""
    if not isinstance(token, int):
        return token
    from ..data.tokenizing.tokenizer import Tokenizer  # a command line that imports nothing does without this library

    try:
        return Tokenizer.load(Path(tokenizer), token).name_of(token)
    except ValueError as error:
        fix = "give the import the tokenizer.json that its model was trained with"
        raise ConfigError([Problem("data.tokenizer", str(error), fix)]) from error


def _model(saved: dict[str, Any], today: dict[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node of the model: the import's, or a typed one with what it leaves open."""
    if "model" in typed or "model._target_" in typed:
        return {**today, **{name: value for name, value in saved.items() if name in today and today[name] is None}}
    kind = cast(Any, option_of("model", saved))
    node = {**dataclasses.asdict(kind()), **copy.deepcopy(saved)}
    return node | {key.removeprefix("model."): today[key.removeprefix("model.")] for key in typed if key.startswith("model.")}


def _taken(today: Mapping[str, Any], node: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line with the keys that are the import's and not those of the recipe files."""
    said = [f"model.{name}={value}" for name, value in node.items() if today.get(name) != value and not name.startswith("_")]
    if said:
        yield f"taken from the imported checkpoint: {', '.join(said)}"
