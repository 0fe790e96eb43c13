"""Where classes that checkpoints and recipes name by `_target_` have moved to."""

from __future__ import annotations

from typing import Any

MOVED = {
    "meshloom.models.llama.Llama": "meshloom.models.decoder.Decoder",
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
"""Beginning of an old `_target_` → what stands there now. One that does not begin like any of these has not moved."""


def with_moved_targets(node: Any) -> Any:
    """A copy of plain containers in which every `_target_` names the class where it is now."""
    if isinstance(node, dict):
        return {key: _moved(value) if key == "_target_" else with_moved_targets(value) for key, value in node.items()}
    if isinstance(node, list):
        return [with_moved_targets(value) for value in node]
    return node


def _moved(target: Any) -> Any:
    for old, new in MOVED.items():
        if isinstance(target, str) and target.startswith(old):
            return new + target.removeprefix(old)
    return target
