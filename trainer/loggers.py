"""Where a run says how it goes: metrics.jsonl, the progress line, Weights & Biases, TensorBoard.

Rows arrive through `Hook.on_metrics` when their numbers have reached the host, so nothing here makes the GPU wait. All of
these hooks belong to one process, rank 0.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from ..config import LoggingConfig
from ..config.problems import ConfigError, Problem
from .hooks import Hook
from .loop import Loop

PLAIN_SECONDS = 10.0  # least time between progress lines where there is no terminal


def default_loggers(config: LoggingConfig, output_dir: Path, run_config: DictConfig) -> list[Hook]:
    """The loggers that `logging` asks for, the run's metrics file first."""
    loggers: list[Hook] = [MetricsFile(output_dir / "metrics.jsonl", config.every)]
    if config.progress:
        loggers.append(ProgressLine())
    if config.tensorboard:
        loggers.append(TensorBoard(output_dir / "tensorboard", config.every))
    if config.wandb:
        loggers.append(WandB(config.project, output_dir, run_config, config.every))
    return loggers


def logging_problems(config: LoggingConfig) -> list[Problem]:
    """Loggers whose library is not installed."""
    return [
        Problem(f"logging.{name}", f"{name} is not installed", f"pip install 'meshloom[{name}]', or logging.{name}=false")
        for name in ("wandb", "tensorboard")
        if getattr(config, name) and importlib.util.find_spec(name) is None
    ]


class MetricsFile(Hook):
    """metrics.jsonl: one object a line, appended and flushed; a resumed run first drops the rows beyond its first step."""

    def __init__(self, path: Path, every: int) -> None:
        self._path = path
        self._every = every
        self._file: Any = None

    def on_run_begin(self, loop: Loop) -> None:
        """Drop what is about to be done again, and open the file."""
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step(line) <= loop.progress.step]
            draft = self._path.with_suffix(".tmp")
            draft.write_text("".join(f"{line}\n" for line in kept if loop.progress.step))
            draft.replace(self._path)
        self._file = self._path.open("a")

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Write the row of a step that is due."""
        if _due(row, self._every):
            self._write(row)

    def on_evaluate(self, loop: Loop, row: dict[str, Any]) -> None:
        """Write the evaluation."""
        self._write(row)

    def on_checkpoint(self, loop: Loop, row: dict[str, Any]) -> None:
        """Write how a save went, under the step it saved."""
        self._write({"step": row["checkpoint_step"], **row})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def _due(row: dict[str, Any], every: int) -> bool:
    """Whether a step's row is one of those that `logging.every` asks for; the first step always is."""
    return row["step"] % every == 0 or row["step"] == 1


def _step(line: str) -> float:
    """The step of a row; infinity for a line that was cut short by a crash, so that it is dropped."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class ProgressLine(Hook):
    """One line that shows where the run is: on a terminal in place, behind a bar; elsewhere printed now and then."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._began = 0.0
        self._begin = 0.0
        self._shown = 0.0
        self._eval_loss: float | None = None

    def on_run_begin(self, loop: Loop) -> None:
        """Say what is about to happen."""
        self._console.print(f"{loop.mesh.layout.describe()}, {loop.horizon.length}, writing to {loop.output_dir}")
        if loop.progress.step:
            self._console.print(f"going on from step {loop.progress.step}")
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
            self._bar.update(self._bar.task_ids[0], completed=done, description=line)
        elif loop.finished or row["step"] == 1 or time.monotonic() - self._shown >= PLAIN_SECONDS:
            self._console.print(line)
            self._shown = time.monotonic()

    def on_evaluate(self, loop: Loop, row: dict[str, Any]) -> None:
        """Say the validation loss, on a line that stays."""
        self._eval_loss = row["eval_loss"]
        self._console.print(f"step {row['step']}: validation loss {row['eval_loss']:.4f}")

    def on_run_end(self, loop: Loop, output_dir: Path) -> None:
        """Say where everything is."""
        self._stop()
        final = "" if self._eval_loss is None else f", validation loss {self._eval_loss:.4f}"
        self._console.print(f"done: {loop.progress.step} steps{final}. Metrics, checkpoints and config are in {output_dir}")

    def close(self) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

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


class TensorBoard(Hook):
    """Event files for TensorBoard. Needs the extra meshloom[tensorboard]."""

    def __init__(self, folder: Path, every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._every = every
        self._open = SummaryWriter
        self._writer: Any = None

    def on_run_begin(self, loop: Loop) -> None:
        """Open the writer; events of steps that are done again are hidden by the new ones."""
        self._writer = self._open(str(self._folder), purge_step=loop.progress.step + 1)

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Write the numbers of a step that is due."""
        if _due(row, self._every):
            self._write(row)

    def on_evaluate(self, loop: Loop, row: dict[str, Any]) -> None:
        """Write the evaluation."""
        self._write(row)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])


class WandB(Hook):
    """Weights & Biases; WANDB_MODE=offline needs no network. A resumed run goes on in the same wandb run.

    Needs the extra meshloom[wandb].
    """

    def __init__(self, project: str, output_dir: Path, run_config: DictConfig, every: int) -> None:
        import wandb

        self._wandb: Any = wandb
        self._project = project
        self._output_dir = output_dir
        self._config = OmegaConf.to_container(run_config, resolve=True)
        self._name = str(run_config.get("recipe"))
        self._every = every
        self._id: str | None = None
        self._run: Any = None

    def on_run_begin(self, loop: Loop) -> None:
        """Start the wandb run, or go on in the one that the checkpoint names."""
        self._id = self._id or uuid.uuid4().hex[:12]
        try:
            self._run = self._wandb.init(
                project=self._project,
                id=self._id,
                name=self._name,
                resume="allow",
                dir=str(self._output_dir),
                config=self._config,
                settings=self._wandb.Settings(silent=True),
            )
        except self._wandb.Error as error:  # no key, no network
            fix = "run `wandb login`, or set WANDB_MODE=offline, or logging.wandb=false"
            raise ConfigError([Problem("logging.wandb", f"can't begin: {error}", fix)]) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Send the numbers of a step that is due."""
        if _due(row, self._every):
            self._run.log(row)

    def on_evaluate(self, loop: Loop, row: dict[str, Any]) -> None:
        """Send the evaluation."""
        self._run.log(row)

    def on_checkpoint(self, loop: Loop, row: dict[str, Any]) -> None:
        """Send how a save went, under the step it saved."""
        self._run.log({"step": row["checkpoint_step"], **row})

    def close(self) -> None:
        """Finish the wandb run; what is left is sent."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def state_dict(self) -> dict[str, Any]:
        """Which wandb run this is."""
        return {"id": self._id}

    @property
    def waits_for_rows(self) -> bool:
        """The run's name does not depend on what it logs."""
        return False

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in that one."""
        self._id = state.get("id")
