"""Old names in checkpoints, recipes and command lines: moved classes and renamed keys."""

from __future__ import annotations

import copy
from typing import Any

MOVED = {
    "meshloom.models.llama.Llama": "meshloom.models.decoder.Decoder",
    "meshloom.data.nodes.Shards": "meshloom.data.nodes.Tokenized",
    "meshloom.optim.adamw.": "meshloom.optim.optimizers.adamw.",
    "meshloom.optim.adagrad.": "meshloom.optim.optimizers.adagrad.",
    "meshloom.optim.agvm.": "meshloom.optim.optimizers.agvm.",
    "meshloom.optim.layerwise.": "meshloom.optim.optimizers.layerwise.",
    "meshloom.optim.schedule.": "meshloom.optim.schedules.schedule.",
    "meshloom.optim.wsd.": "meshloom.optim.schedules.wsd.",
    "meshloom.optim.batch.Fixed": "meshloom.optim.batch.controller.Fixed",
    "meshloom.optim.batch.Stages": "meshloom.optim.batch.controller.Stages",
    "meshloom.optim.batch.Ramp": "meshloom.optim.batch.controller.Ramp",
    "meshloom.optim.adaptive.": "meshloom.optim.batch.adaptive.",
}
"""Prefix of an old `_target_` → its new prefix. A path with none of these prefixes has not moved."""


RENAMED_KEYS: dict[str, str] = {}
"""Old key → new key. A checkpoint's key is read under the new name; a typed one is a problem that names the new key."""


FORMER_VALUES: dict[str, Any] = {"data.version": 1}
"""Key → the value that a checkpoint from before it stands for, of an option that has the key."""


def with_moved_targets(node: Any) -> Any:
    """Return a copy of plain containers in which every `_target_` is the current path of its class."""
    if isinstance(node, dict):
        return {key: _moved(value) if key == "_target_" else with_moved_targets(value) for key, value in node.items()}
    if isinstance(node, list):
        return [with_moved_targets(value) for value in node]
    return node


def with_renamed_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a saved config in which every key has its current name."""
    found = copy.deepcopy(config)
    for old, new in RENAMED_KEYS.items():
        *groups, name = old.split(".")
        node: Any = found
        for group in groups:
            node = node.get(group) if isinstance(node, dict) else None
        if isinstance(node, dict) and name in node:
            value = node.pop(name)
            *groups, name = new.split(".")
            node = found
            for group in groups:
                node = node.setdefault(group, {})
            node.setdefault(name, value)
    return found


def _moved(target: Any) -> Any:
    for old, new in MOVED.items():
        if isinstance(target, str) and target.startswith(old):
            return new + target.removeprefix(old)
    return target
