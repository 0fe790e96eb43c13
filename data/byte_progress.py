"""Progress of work on bytes: files that are hashed, verified or copied."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Lock
from typing import TypeAlias

from ..config.progress_bar import progress

CountBytes: TypeAlias = Callable[[int], None]
"""Told how many bytes more are done; several threads may call it."""


@contextmanager
def byte_progress(title: str, total: int, *, quiet: bool = False, announce: bool = False) -> Generator[CountBytes]:
    """Show how far the block is, which tells what is yielded. total: bytes of all; quiet, announce: as in `progress`"""
    done, lock = 0, Lock()
    with progress(title, quiet=quiet, announce=announce) as advance:

        def count(size: int) -> None:
            nonlocal done
            with lock:
                done += size
                advance(done, total)

        yield count


def gigabytes(size: int) -> str:
    """Word a number of bytes."""
    return f"{size / 1e9:.2f} GB"
