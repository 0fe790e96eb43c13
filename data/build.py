"""Build data nodes: Meshloom's classes take their config and `seed`, a user's own class its node's keys and `seed`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.nodes import Custom, build, find_option, typed_option
from ..config.problems import ConfigError, Problem
from .config import OPTIONS, CustomData, DataConfig, SyntheticConfig
from .corpus import Corpus
from .node import DataNode

DEFAULT_VOCABULARY = 32_000  # of synthetic data where neither model nor data set one
LEFT_OUT = ("name", "_recursive_")  # keys that a user's own class is not called with


def build_node(config: DataConfig, seed: int, vocabulary: int | None) -> DataNode:
    """Build the data node. vocabulary: the model's, used by a node whose own is null."""
    vocabulary = vocabulary or DEFAULT_VOCABULARY
    if isinstance(config, Custom):
        live = {"vocabulary": vocabulary} if config.keys.get("vocabulary", 0) is None else {}
        return build(config, leave_out=(*LEFT_OUT, *live), seed=seed, **live)
    if isinstance(config, SyntheticConfig) and config.vocabulary is None:
        config = dataclasses.replace(config, vocabulary=vocabulary)
    return build(config, seed=seed)


def build_source(node: Mapping[str, Any], shared: Mapping[str, Any], seed: int, key: str) -> DataNode:
    """Build a source of a mixture, or a validation set, from its node in plain containers.

    Raises ConfigError for keys that are wrong.

    shared  keys of the mixture, which replace those of a source that has them
    key     the node's
    """
    built = _build_source(node, shared, seed, key)
    if isinstance(built, Corpus):
        built.source.key = key
    return built


def _build_source(node: Mapping[str, Any], shared: Mapping[str, Any], seed: int, key: str) -> DataNode:
    keys = dict(node)
    path = keys.pop("_target_", "")
    option = find_option(OPTIONS, path)
    if option is not None:
        known = {field.name for field in dataclasses.fields(option)}
        values = {**keys, **{name: value for name, value in shared.items() if name in known}}
        return build(typed_option(option, values, key), seed=seed)
    if not path:
        kinds = ", ".join(str(kind.name) for kind in OPTIONS)
        fix = f"choose one in the recipe's defaults (/data@sources.<name>: jsonl): {kinds}"
        raise ConfigError([Problem(f"{key}._target_", "the source has no kind", fix)])
    given = {**keys, **{name: value for name, value in shared.items() if name in keys}}
    return build(CustomData(path=path, keys=given), leave_out=LEFT_OUT, seed=seed)


def system_problem(key: str, error: OSError, cache: Path) -> Problem:
    """Word an error of the operating system met while data are prepared. key: their node's; cache: the cache's folder."""
    place = Path(error.filename or cache)
    fix = "check the disk that it is on, and whether you may read it"
    if place.is_relative_to(cache):
        fix = "make room or get access, or set data.cache_dir to another folder"
    return Problem(key, f"{place}: {error.strerror or error}", fix)
