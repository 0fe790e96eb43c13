"""Show on stderr how far something long has come: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

EVERY = 30.0
"""Seconds between two lines where there is no terminal: a command of seconds says nothing."""

Advance = Callable[[int, int], None]
"""(done, of all, in one unit) → None. Of all: 0 where that is not known; it may be a guess."""


@contextmanager
def progress(title: str, *, quiet: bool = False, announce: bool = False) -> Generator[Advance]:
    """Show the progress of what runs in the block, which calls what is yielded. The bar vanishes at the end.

    quiet     show nothing; what the block prints is shown all the same
    announce  where there is no terminal, print the title at once
    """
    if quiet:
        yield lambda done, total: None
        return
    if not sys.stderr.isatty():
        if announce:
            print(f"{title} …", file=sys.stderr, flush=True)
        yield _lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)
    columns = text, BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    # Redirected output goes to stderr, above the bar. What is printed to a file or a pipe must arrive there.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


def _lines(title: str) -> Advance:
    """Return what prints a line whenever EVERY seconds have passed since the last."""
    last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            share = f"{min(1.0, done / total):.0%}" if total else "…"
            print(f"{title}: {share}", file=sys.stderr, flush=True)

    return advance
