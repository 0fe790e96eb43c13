"""A progress bar on standard error."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str, total: int | None, *, quiet: bool = False) -> Generator[Callable[[int], None]]:
    """Show a bar on stderr until the block ends; in a log, a line before it and one after it.

    Gives a function that is called with what has been done since.

    total: of it, if known; it may be a guess. quiet: show nothing
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:  # there the bar is printed once, at the end
        console.print(f"{what} …", highlight=False, markup=False, soft_wrap=True)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount: progress.advance(task, amount)
        progress.update(task, total=1, completed=1)  # whatever the guess was
