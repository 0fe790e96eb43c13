"""The progress line on the terminal, or in the log of a job."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from ....config.words import counted
from ...loop import Loop
from ..base import Hook

PLAIN_SECONDS = 10.0  # least time between progress lines where there is no terminal


class PatientConsole(Console):
    """A console that falls silent when nobody reads it any more (`| head`): no reason to end training."""

    def on_broken_pipe(self) -> None:
        """Write nothing from now on, as rich does, but don't exit."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


class ProgressLine(Hook):
    """Shows the run's progress in one line: in place with a bar on a terminal, elsewhere printed every few seconds."""

    alone = True

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or PatientConsole(file=sys.stdout, markup=False, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._began = 0.0
        self._begin = 0.0
        self._shown = 0.0
        self._eval_loss: float | None = None

    def on_run_begin(self, loop: Loop) -> None:
        """Print layout, length and folder, and the step that the run resumes from."""
        self._print(f"{loop.mesh.layout.describe()}, {loop.horizon.length}, writing to {loop.output_dir}")
        if loop.finished:
            self._print(f"nothing is left to do: the checkpoint is at step {loop.progress.step}")
        elif loop.progress.step:
            self._print(f"going on from step {loop.progress.step}")
        self._began, self._begin = time.monotonic(), loop.horizon.position(loop.progress, loop.horizon.unit)
        if self._console.is_terminal:
            line = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
            self._bar = Progress(BarColumn(bar_width=12), line, console=self._console, refresh_per_second=4)
            self._bar.add_task("", total=loop.horizon.total, completed=round(self._begin))
            self._bar.start()

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Show the newest step."""
        done = {"steps": row["step"], "tokens": row["tokens"], "samples": row["samples"]}[loop.horizon.unit.value]
        line = self._line(loop, row, done)
        if self._bar is not None:
            self._attempt(lambda bar: bar.update(bar.task_ids[0], completed=done, description=line))
        elif loop.finished or row["step"] == 1 or time.monotonic() - self._shown >= PLAIN_SECONDS:
            self._print(line)
            self._shown = time.monotonic()

    def on_evaluate(self, loop: Loop, row: dict[str, Any]) -> None:
        """Print the validation loss on a line of its own."""
        self._eval_loss = row["eval_loss"]
        named = {
            key.removeprefix("validation/").removesuffix("/loss"): row[key] for key in row if key.startswith("validation/")
        }
        parts = [f"{name} {loss:.4f}" for name, loss in named.items()]
        of_sources = f" ({', '.join(parts)})" if parts else ""
        self._print(f"step {row['step']}: validation loss {row['eval_loss']:.4f}{of_sources}")

    def on_tasks(self, loop: Loop, row: dict[str, Any]) -> None:
        """Print the tasks' values on a line of their own."""
        parts = [f"{key.removeprefix('tasks/')} {value:.4f}" for key, value in row.items() if key.startswith("tasks/")]
        self._print(f"step {row['step']}: {', '.join(parts)}")

    def on_run_end(self, loop: Loop, output_dir: Path) -> None:
        """Print the final state and the run's folder."""
        self._stop()
        final = "" if self._eval_loss is None else f", validation loss {self._eval_loss:.4f}"
        self._print(f"done: {counted(loop.progress.step, 'step')}{final}. Metrics, checkpoints and config are in {output_dir}")

    def close(self) -> None:
        """Stop the bar, which restores the terminal."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._attempt(Progress.stop)
            self._bar = None

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._console.print(text)

    def _attempt(self, action: Callable[[Progress], None]) -> None:
        assert self._bar is not None
        with contextlib.suppress(OSError):
            action(self._bar)

    def _line(self, loop: Loop, row: dict[str, Any], done: float) -> str:
        total = loop.horizon.total
        parts = [
            f"step {row['step']}",
            f"{min(1.0, done / total):.0%}",
            f"loss {row['loss']:.4f}",
            f"lr {row['lr']:.2e}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
        ]
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.1%}")
        elapsed, covered = time.monotonic() - self._began, done - self._begin
        if covered > 0:
            parts.append(f"ETA {_clock(elapsed / covered * max(0.0, total - done))}")
        return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
