"""Python's cyclic garbage collection, run at the same step on all ranks instead of whenever one rank triggers it."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from .base import Hook

if TYPE_CHECKING:
    from ..loop import Loop


class CollectGarbage(Hook):
    """Collects garbage every `every` steps, at the same step on every rank, and never in between.

    A collection walks all objects that torch has made, which takes hundreds of milliseconds. A rank that stops for it makes all
    others wait in the next collective. Objects that exist after the first step, when the model is compiled, are frozen:
    later collections skip them.
    """

    def __init__(self, every: int = 50) -> None:
        self._every = every
        self._frozen = False

    def on_run_begin(self, loop: Loop) -> None:
        """Disable Python's automatic collection."""
        gc.disable()

    def on_step_end(self, loop: Loop) -> None:
        """Collect all generations, if due at this step: a younger one alone would keep what has survived once."""
        if not self._frozen:
            gc.collect()
            gc.freeze()
            self._frozen = True
        elif loop.progress.step % self._every == 0:
            gc.collect()

    def close(self) -> None:
        """Enable Python's automatic collection again."""
        gc.unfreeze()
        gc.enable()
