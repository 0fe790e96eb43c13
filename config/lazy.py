"""Libraries that are imported when they are first used.

A command that refuses a faulty config or prints a list needs none of them, and importing them would double its time.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule(ModuleType):
    """A module that is imported when one of its names is first looked up."""

    def __getattr__(self, name: str) -> Any:
        """Import the module. Its names become this object's own, so that later look-ups are as fast as in the module."""
        module = importlib.import_module(self.__name__)
        self.__dict__.update(module.__dict__)
        return getattr(module, name)


if TYPE_CHECKING:
    import numpy
    import psutil
else:
    numpy = LazyModule("numpy")
    psutil = LazyModule("psutil")

__all__ = ["numpy", "psutil"]
