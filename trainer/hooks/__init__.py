"""Hooks: small stateful objects that observe a run, one file each."""

from .base import Hook

__all__ = ["Hook"]
