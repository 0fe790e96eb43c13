"""Hooks' states in a checkpoint: each its own, whatever else is listed."""

from __future__ import annotations

from typing import Any

from meshloom.trainer.hooks.base import Hook, hooks_by_name
from meshloom.trainer.hooks.garbage import CollectGarbage


class Counting(Hook):
    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}


def test_two_hooks_of_a_class_keep_states_of_their_own() -> None:
    hooks = [Counting(1), CollectGarbage(), Counting(2), Counting(3)]
    assert {name: hook.state_dict() for name, hook in hooks_by_name(hooks).items() if hook.state_dict()} == {
        "Counting": {"count": 1},
        "Counting 2": {"count": 2},
        "Counting 3": {"count": 3},
    }
