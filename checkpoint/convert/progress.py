"""Progress of a conversion, told to the command that shows it. Without a listener nothing is told."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from ...config.progress_bar import Advance

_listener: ContextVar[Advance | None] = ContextVar("conversion_listener", default=None)


@contextmanager
def listening(listener: Advance) -> Generator[None]:
    """Tell this listener how far conversions within the block come."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(done: int, total: int) -> None:
    """Tell the listener, if there is one, that so much of all is done."""
    if (listener := _listener.get()) is not None:
        listener(done, total)
