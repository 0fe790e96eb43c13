"""The collector runs at agreed steps only, and is as before when the run is over."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any, cast

from meshloom.trainer.hooks.garbage import CollectGarbage


def test_cycles_go_at_agreed_steps_only() -> None:
    assert gc.isenabled()
    hook = CollectGarbage(every=10)
    collections: list[int] = []

    def seen(phase: str, info: dict[str, Any]) -> None:
        if phase == "stop":
            collections.append(info["generation"])

    hook.on_run_begin(cast(Any, None))
    gc.callbacks.append(seen)
    try:
        for step in range(1, 31):
            for _ in range(2000):  # many more than Python would collect at by itself
                cycle: list[Any] = []
                cycle.append(cycle)
            hook.on_step_end(cast(Any, SimpleNamespace(progress=SimpleNamespace(step=step))))
        assert collections == [2, 2, 2, 2], "after the first step, the tenth, …"
        assert gc.get_freeze_count() > 0
    finally:
        gc.callbacks.remove(seen)
        hook.close()
    assert gc.isenabled() and gc.get_freeze_count() == 0


class Held:
    """Something whose end can be seen."""


def test_objects_that_survive_a_collection_go_in_a_later_one() -> None:
    hook = CollectGarbage(every=10)
    hook.on_run_begin(cast(Any, None))
    try:
        for step in range(1, 21):
            if step == 2:
                held = Held()
                held.itself = held  # type: ignore[attr-defined]
                seen = weakref.ref(held)
            if step == 11:
                assert seen() is not None
                del held
            hook.on_step_end(cast(Any, SimpleNamespace(progress=SimpleNamespace(step=step))))
        assert seen() is None
    finally:
        hook.close()
