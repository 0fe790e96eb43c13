"""The collector runs at agreed steps only, and is as before when the run is over."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any, cast

from meshloom.trainer.garbage import CollectGarbage


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
        assert collections == [1, 1, 1]
        assert gc.get_freeze_count() > 0
    finally:
        gc.callbacks.remove(seen)
        hook.close()
    assert gc.isenabled() and gc.get_freeze_count() == 0
