"""The tables of a report: results, settings that differ, saves, incidents."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

from ...config.words import counted
from ..ranking import ranked
from .collect import ReportedRun
from .figure import short

COLUMNS = 6
"""Most settings that the table of results shows as columns."""
SAVES, INCIDENTS = 20, 200
"""Most rows of a table; the newest are shown."""
SAVE_PARTS = ("stall", "staging", "writing", "commit", "total")
"""Parts of a save's time, in the order of the table's columns."""
ABSENT = "–"
LONGEST = 60
"""Characters of a setting's value."""


@dataclass(frozen=True)
class Table:
    """A table. marked: number of the row that stands out; note: a sentence below it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int | None = None
    note: str = ""


def results(runs: Sequence[ReportedRun], winner: ReportedRun | None, differing: Mapping[str, Sequence[str]]) -> Table:
    """Tabulate how far each run has come; with the settings that differ, where they are few. The best run comes first."""
    ordered = [runs[at] for at in ranked([run.standing for run in runs])]
    shown = list(differing)[:COLUMNS] if len(runs) > 1 else []
    at = {run.name: number for number, run in enumerate(runs)}
    head = ["run", *shown, "state", "steps", "tokens", "training loss", "validation loss", "tokens/s", "MFU", "memory, GiB"]
    rows = [
        [
            run.name,
            *(differing[key][at[run.name]] for key in shown),
            state(run),
            f"{run.reached['steps']:,}",
            short(run.reached["tokens"]),
            *(_loss(loss) for loss in (run.training_loss, run.validation_loss)),
            *_speed(run),
        ]
        for run in ordered
    ]
    left_out = [key for key in differing if key not in shown]
    note = f"{counted(len(left_out), 'more setting')} differ" if left_out and len(runs) > 1 else ""
    empty = [column for column in range(1 + len(shown), len(head)) if all(row[column] == "–" for row in rows)]
    keep = [column for column in range(len(head)) if column not in empty]
    return Table(
        "Results" if len(runs) > 1 else "Result",
        [head[column] for column in keep],
        [[row[column] for column in keep] for row in rows],
        ordered.index(winner) if winner in ordered and len(runs) > 1 else None,
        note,
    )


def _speed(run: ReportedRun) -> list[str]:
    """Return medians of tokens/s and MFU after the first steps, which compile and warm up, and the peak of memory."""
    rows = run.metrics.steps[min(3, len(run.metrics.steps) - 1) :] if run.metrics.steps else []
    mfu = [row["mfu"] for row in rows if "mfu" in row]
    memory = [row["memory_gib"] for row in rows if "memory_gib" in row]
    return [
        f"{median(row['tokens_per_second'] for row in rows):,.0f}" if rows else "–",
        f"{median(mfu):.1%}" if mfu else "–",
        f"{max(memory):.1f}" if memory else "–",
    ]


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}"


def state(run: ReportedRun) -> str:
    """Say in a few words whether a run has reached its length."""
    if run.fault:
        return "its config can't be read"
    if not run.metrics.steps:
        return "no step yet"
    diverged = "; loss not finite" if run.diverged else ""
    if run.finished:
        return f"finished{diverged}"
    of = f" of {short(run.length[1])} {run.length[0]}" if run.length is not None else ""
    reached = short(run.reached[run.length[0] if run.length is not None else "steps"])
    return f"at {reached}{of}{diverged}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a config, with dots, and their values."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(cast(Mapping[str, Any], value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differences(runs: Sequence[ReportedRun]) -> dict[str, list[Any]]:
    """Return key → value of each run, for the keys that have several values. Where a run is kept says nothing of it.

    A run without a key has `ABSENT`. One whose config can't be read has it everywhere, and makes no difference.
    """
    configs = [dict(flat(run.config)) for run in runs]
    read = [at for at, run in enumerate(runs) if not run.fault]
    keys = dict.fromkeys(key for config in configs for key in config)
    found = {key: [config.get(key, ABSENT) for config in configs] for key in keys if key not in ("output_dir", "resume")}
    return {key: values for key, values in found.items() if any(values[at] != values[read[0]] for at in read)}


def written(value: Any) -> str:
    """Write a setting's value for a table."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def config_table(runs: Sequence[ReportedRun], differing: Mapping[str, Sequence[str]], sides: Mapping[str, str]) -> Table:
    """Tabulate the settings that differ: a row for each key, a column for each run."""
    rows = [[key, sides.get(key, ""), *values] for key, values in differing.items()]
    return Table("Settings that differ", ["key", "side", *(run.name for run in runs)], rows)


def save_table(runs: Sequence[ReportedRun]) -> Table | None:
    """Tabulate the saves; None without any."""
    rows = [
        [
            *([run.name] if len(runs) > 1 else []),
            f"{row['checkpoint_step']:,}",
            "committed" if row.get("checkpoint_saved") else "not committed",
            *(f"{row.get(f'checkpoint/{name}_seconds', 0.0):.3g}" for name in SAVE_PARTS),
            f"{row.get('checkpoint/total_bytes', 0.0) / 2**20:,.1f}",
        ]
        for run in runs
        for row in run.metrics.saves
    ]
    head = ["step", "outcome", "training waited, s", "copying, s", "writing, s", "commit, s", "in all, s", "MiB"]
    return _newest("Checkpoints", [*(["run"] if len(runs) > 1 else []), *head], rows, SAVES)


def incident_table(runs: Sequence[ReportedRun]) -> Table | None:
    """Tabulate what has happened to the runs; None if nothing has."""
    found = sorted(((run, row) for run in runs for row in run.incidents), key=lambda each: each[1].get("time") or 0.0)
    rows = [
        [
            *([run.name] if len(runs) > 1 else []),
            _moment(row.get("time")),
            str(row["kind"]),
            *("–" if row.get(name) is None else str(row[name]) for name in ("step", "rank")),
            str(row.get("message", "")),
        ]
        for run, row in found
    ]
    head = [*(["run"] if len(runs) > 1 else []), "time", "kind", "step", "rank", "what was said"]
    return _newest("Incidents", head, rows, INCIDENTS)


def _newest(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], most: int) -> Table | None:
    if not rows:
        return None
    note = f"the newest {most} of {len(rows):,}" if len(rows) > most else ""
    return Table(title, head, rows[-most:], note=note)


def _moment(seconds: Any) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if isinstance(seconds, int | float) else "–"
