"""Python's cyclic garbage collector off the hot path: it runs when all ranks can spare the time, not when one feels like it."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from .hooks import Hook

if TYPE_CHECKING:
    from .loop import Loop


class CollectGarbage(Hook):
    """Collects every `every` steps, on every rank at the same one, and never in between.

    A full collection walks every object that torch has made, hundreds of milliseconds; a rank that stops for it makes
    all others wait in the next collective. What is built before the run begins is not looked at again.
    """

    def __init__(self, every: int = 50) -> None:
        self._every = every

    def on_run_begin(self, loop: Loop) -> None:
        """Take over from Python."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def on_step_end(self, loop: Loop) -> None:
        """Collect what is young at a step that all ranks know."""
        if loop.progress.step % self._every == 0:
            gc.collect(1)

    def close(self) -> None:
        """Give back to Python."""
        gc.unfreeze()
        gc.enable()
