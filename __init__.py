"""Meshloom: pre-training of language models on changing clusters. The folders beside this file are its packages.

The names below are the Python API (docs/python.md). Each is imported when it is first used: `import meshloom` imports nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config.problems import ConfigError
    from .launch.api import TrainingFailed, TrainingStopped, export, train
    from .launch.load import LoadedModel, load
    from .launch.run_folder import Run
    from .launch.run_metrics import Metrics

__version__ = "0.1.0"

__all__ = ["ConfigError", "LoadedModel", "Metrics", "Run", "TrainingFailed", "TrainingStopped", "export", "load", "train"]

_MODULES = {
    "ConfigError": "config.problems",
    "LoadedModel": "launch.load",
    "Metrics": "launch.run_metrics",
    "Run": "launch.run_folder",
    "TrainingFailed": "launch.api",
    "TrainingStopped": "launch.api",
    "export": "launch.api",
    "load": "launch.load",
    "train": "launch.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'meshloom' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
