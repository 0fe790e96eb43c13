"""The tree of a composed config: its keys, and those that no dataclass declares."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

SCHEMA = "schema"
"""Name in Hydra's ConfigStore of the dataclass of the whole config, which `trainer/schema.py` registers."""


@functools.cache  # the store copies the whole schema for each look at it
def run_schema() -> type:
    """Return the dataclass of the whole config."""
    kind = OmegaConf.get_type(ConfigStore.instance().load(f"{SCHEMA}.yaml").node)
    assert kind is not None
    return kind


def keys_in(config: DictConfig) -> Iterator[str]:
    """Yield every key, groups included."""
    for name, value in config.items_ex(resolve=False):
        yield str(name)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            yield from (f"{name}.{key}" for key in keys_in(value))


def drop_unknown(config: DictConfig) -> list[str]:
    """Delete the keys that the schema and its typed groups don't have. Return them."""
    unknown = list(_unknown(config, run_schema()))
    for key in unknown:
        delete_key(config, key)
    return unknown


def _unknown(config: DictConfig, kind: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for name, value in config.items_ex(resolve=False):
        if name not in hints:
            yield f"{prefix}{name}"
        elif dataclasses.is_dataclass(hints[name]) and isinstance(value, DictConfig):
            yield from _unknown(value, hints[name], f"{prefix}{name}.")


def delete_key(config: DictConfig, key: str) -> bool:
    """Delete a key, also one whose value is null. Return whether it was there."""
    parent, _, leaf = key.rpartition(".")
    node: Any = OmegaConf.select(config, parent) if parent else config
    if isinstance(node, DictConfig) and leaf in node:
        with open_dict(node):
            del node[leaf]
        return True
    return False
