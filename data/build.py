"""From the config of `data` to the node that it describes."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config.nodes import Custom, import_object
from .config import DataConfig
from .node import DataNode

UNTOLD_VOCABULARY = 32_000  # of synthetic data where the model leaves it to the data as well
HYDRAS = ("_target_", "_recursive_", "name")  # which no class is called with


def build_node(config: DataConfig, seed: int, vocabulary: int | None) -> DataNode:
    """Build the data node. vocabulary: the model's, which a synthetic one takes where it has none of its own."""
    keys: dict[str, Any] = dict(config.keys) if isinstance(config, Custom) else dataclasses.asdict(config)
    path = config.path if isinstance(config, Custom) else config._target_
    keys = {key: value for key, value in keys.items() if key not in HYDRAS}
    if keys.get("vocabulary", 0) is None:
        keys["vocabulary"] = vocabulary or UNTOLD_VOCABULARY
    return import_object(path)(**keys, seed=seed)
