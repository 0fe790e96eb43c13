"""Show on stderr how far a long command has come: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

EVERY = 30.0
"""Seconds between two lines where there is no terminal: a command of seconds says nothing."""

Advance = Callable[[int, int], None]
"""(done, of all, in one unit) → None."""


@contextmanager
def progress(title: str) -> Generator[Advance]:
    """Show the progress of what runs in the block, which calls what is yielded. The bar vanishes at the end."""
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = TextColumn(title, markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(title: str) -> Advance:
    """Return what prints a line whenever EVERY seconds have passed since the last."""
    last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(f"{title}: {done / max(1, total):.0%}", file=sys.stderr, flush=True)

    return advance
