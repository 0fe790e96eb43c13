"""Hooks: small stateful objects that watch a run, one file each."""

from .base import Hook

__all__ = ["Hook"]
