"""Imports and caches that the bench's fork server has ready for ranks: what a rank would otherwise do anew at each start."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from meshloom.trainer.schema import make_composer

from . import injector  # noqa: F401

make_composer().compose(["recipe=quickstart", "data=synthetic"])
