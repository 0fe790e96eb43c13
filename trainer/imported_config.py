"""Config of a run that begins from an import: its model is the import's, everything else today's."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from omegaconf import OmegaConf, open_dict

from ..config.compose import Composition
from .resumed_config import Resumed, saved_config, typed_values
from .saved_classes import literal, refuse_unnamed_classes
from .typed import option_of


def import_config(state: Mapping[str, Any], fresh: Composition, overrides: Iterable[str]) -> Resumed:
    """Return the config of a run that begins from an import.

    The keys of `model` are the import's where nothing is typed. A typed model is compared with the import's later
    (`checkpoint_fit.py`); sizes that it leaves open are the import's.
    """
    saved = saved_config(state).get("model")
    if not isinstance(saved, dict) or option_of("model", saved) is None:
        return Resumed(fresh.config, choices=fresh.choices)
    refuse_unnamed_classes({"model": saved}, {})
    typed = typed_values(overrides)
    today = cast(dict[str, Any], OmegaConf.to_container(fresh.config.model, resolve=True, throw_on_missing=False))
    chosen = "model" in typed or "model._target_" in typed
    if chosen:
        node = {**today, **{name: value for name, value in saved.items() if name in today and today[name] is None}}
    else:
        kind = cast(Any, option_of("model", saved))
        node = {**dataclasses.asdict(kind()), **copy.deepcopy(saved)}
        node |= {key.removeprefix("model."): today[key.removeprefix("model.")] for key in typed if key.startswith("model.")}
    config = copy.deepcopy(fresh.config)
    with open_dict(config):
        config["model"] = OmegaConf.create(literal(node))
    return Resumed(config, [*_taken(today, node)], choices=fresh.choices)


def _taken(today: Mapping[str, Any], node: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line with the keys that are the import's and not those of the recipe files."""
    said = [f"model.{name}={value}" for name, value in node.items() if today.get(name) != value and not name.startswith("_")]
    if said:
        yield f"taken from the imported checkpoint: {', '.join(said)}"
