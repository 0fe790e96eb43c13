"""Python's cyclic garbage collector off the hot path: it runs when all ranks can spare the time, not when one feels like it."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from .base import Hook

if TYPE_CHECKING:
    from ..loop import Loop


class CollectGarbage(Hook):
    """Collects every `every` steps, on every rank at the same one, and never in between.

    A collection walks every object that torch has made, hundreds of milliseconds; a rank that stops for it makes all others
    wait in the next collective. What is there after the first step, when the model has been compiled, is not looked at again.
    """

    def __init__(self, every: int = 50) -> None:
        self._every = every
        self._settled = False

    def on_run_begin(self, loop: Loop) -> None:
        """Take over from Python."""
        gc.disable()

    def on_step_end(self, loop: Loop) -> None:
        """Collect at a step that all ranks know: always all generations, or what has survived once would stay for ever."""
        if not self._settled:
            gc.collect()
            gc.freeze()
            self._settled = True
        elif loop.progress.step % self._every == 0:
            gc.collect()

    def close(self) -> None:
        """Give back to Python."""
        gc.unfreeze()
        gc.enable()
