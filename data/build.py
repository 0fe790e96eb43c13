"""Build the node that the config of `data` describes."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config.nodes import Custom, import_object
from .config import DataConfig
from .node import DataNode

DEFAULT_VOCABULARY = 32_000  # of synthetic data where neither model nor data set one
HYDRA_KEYS = ("_target_", "_recursive_", "name")  # not passed to constructors


def build_node(config: DataConfig, seed: int, vocabulary: int | None) -> DataNode:
    """Build the data node. vocabulary: the model's, used by a synthetic node without one of its own."""
    keys: dict[str, Any] = dict(config.keys) if isinstance(config, Custom) else dataclasses.asdict(config)
    path = config.path if isinstance(config, Custom) else config._target_
    keys = {key: value for key, value in keys.items() if key not in HYDRA_KEYS}
    if keys.get("vocabulary", 0) is None:
        keys["vocabulary"] = vocabulary or DEFAULT_VOCABULARY
    return import_object(path)(**keys, seed=seed)
