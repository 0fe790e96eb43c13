"""The page of a report: everything in one file, which asks for nothing from a network."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...config.words import counted
from ..ranking import compared_losses
from .charts import Marks, all_charts, sweep_chart
from .collect import ReportedRun
from .drawings import expert_drawings, pipeline_drawing
from .figure import Picture
from .tables import COLUMNS, Table, config_table, differences, incident_table, results, save_table, state, written
from .winner import continue_command, find_winner, sides_of

TEMPLATE = Path(__file__).with_name("page.html")
SETTINGS = 3
"""Most settings of a sweep that have a chart of their own."""
COMPARED = 8
"""Most runs whose settings stand side by side in a table."""
DRAWN = 4
"""Most runs whose experts and pipelines are drawn."""


@dataclass
class Page:
    """Contents of the page, from its top to its end.

    first, then  tables before the charts and after them
    loss         the chart of losses along each axis, of which one is seen at a time
    drawings     pictures that were not drawn by matplotlib, by the heading above them
    notes        what is not shown, and why
    """

    title: str
    subtitle: str
    facts: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    command: str | None = None
    command_title: str = ""
    command_note: str = ""
    first: list[Table] = field(default_factory=list[Table])
    loss: list[Picture] = field(default_factory=list[Picture])
    charts: list[Picture] = field(default_factory=list[Picture])
    drawings: list[tuple[str, list[Picture]]] = field(default_factory=list[tuple[str, list[Picture]]])
    then: list[Table] = field(default_factory=list[Table])
    notes: list[str] = field(default_factory=list[str])

    @property
    def pictures(self) -> list[Picture]:
        """All pictures."""
        return [*self.loss, *self.charts, *(each for _, pictures in self.drawings for each in pictures)]


def make_page(runs: Sequence[ReportedRun], *, png: bool = True) -> Page:
    """Put the report of these runs together. png: also draw each chart as PNG."""
    several = len(runs) > 1
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    where = str(runs[0].run.folder) if not several else counted(len(runs), "run")
    page = Page(_title(runs), f"{where} · {now}")
    differing = differences(runs)
    shown = {key: [written(value) for value in values] for key, values in differing.items()}
    winner = find_winner(runs)
    if several:
        _compare(page, runs, winner, shown)
    else:
        page.facts = _facts(runs[0])
    _add_charts(page, runs, png)
    if several and winner is not None:
        page.charts += _sweep_charts(runs, winner, png)
    _draw(page, runs)
    if several and len(differing) > COLUMNS:
        if len(runs) <= COMPARED:
            page.then.append(config_table(runs, shown, sides_of(runs)))
        else:
            page.notes.append(f"all settings of {len(runs)} runs side by side; these differ: {', '.join(differing)}")
    page.then += [table for table in (incident_table(runs), save_table(runs)) if table is not None]
    page.notes += [f"settings of {run.name}: {run.fault}" for run in runs if run.fault]
    return page


def _title(runs: Sequence[ReportedRun]) -> str:
    if len(runs) == 1:
        return runs[0].name
    recipes = {str(run.config.get("recipe")) for run in runs if run.config.get("recipe")}
    return f"{recipes.pop()}: {len(runs)} runs" if len(recipes) == 1 else f"{len(runs)} runs"


def _facts(run: ReportedRun) -> list[tuple[str, str]]:
    """List the numbers at the top of a single run's page."""
    table = results([run], None, {})
    told = dict(zip(table.head, table.rows[0], strict=True))
    found = [("state", state(run))]
    found += [(name, told[name]) for name in table.head if name not in ("run", "state") and name in told]
    if run.metrics.steps:
        in_steps = float(run.metrics.seconds[-1])
        times = [row["time"] for row in run.metrics.rows if "time" in row]
        found.append(("time in steps", duration(in_steps)))
        if len(times) > 1 and times[-1] > times[0]:
            found.append(("first to last row", duration(times[-1] - times[0])))
    return found


def duration(seconds: float) -> str:
    """Write a time in two units: 2 h 15 min."""
    for size, name, small, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            whole, rest = divmod(round(seconds / small), size // small)
            return f"{whole} {name} {rest} {part}" if rest else f"{whole} {name}"
    return f"{seconds:.3g} s"


def _compare(page: Page, runs: Sequence[ReportedRun], winner: ReportedRun | None, shown: dict[str, list[str]]) -> None:
    """Add the table of results, the winner and the command that goes on with it."""
    page.first.append(results(runs, winner, shown))
    if winner is None:
        page.notes.append("a winner: no run has a loss yet")
        return
    kind = "training" if all(run.validation_loss is None for run in runs) else "validation"
    unfinished = sum(not run.finished for run in runs)
    page.command_title = f"Winner: {winner.name}"
    page.command_note = f"{kind} loss {compared_losses([run.standing for run in runs])[runs.index(winner)]:.4f}"
    if unfinished:
        page.command_note += f"; {unfinished} of {len(runs)} runs have not reached their length"
    continuation = continue_command(winner)
    page.command = continuation.line
    if page.command is None:
        page.notes.append(f"a command that goes on with {winner.name}: {continuation.note}")
    else:
        page.command_note += ". To go on with it, to twice its length"
        page.command_note += " (with the --config-dir that it was started with, if any):"
        if continuation.note:
            page.notes.append(f"in the command that goes on with {winner.name}: {continuation.note}")


def _add_charts(page: Page, runs: Sequence[ReportedRun], png: bool) -> None:
    marks = {run.name: Marks(_incident_steps(run)) for run in runs} if len(runs) <= DRAWN else {}
    for picture in all_charts({run.name: run.metrics for run in runs}, marks, png=png):
        (page.loss if picture.name.startswith("loss_by_") else page.charts).append(picture)
    silent = [run.name for run in runs if not run.metrics.steps]
    if silent:
        page.notes.append(f"charts of {', '.join(silent)}: metrics.jsonl has no row of a step yet")
    drawn = {picture.name for picture in page.charts}
    missing = {
        "memory": "memory and MFU: they are measured on GPUs",
        "noise": "gradient noise: only batch controllers that measure it have it (docs/batch.md)",
        "validation_by_source": "validation loss by source: the data are one source, or none was evaluated",
    }
    page.notes += [why for name, why in missing.items() if name not in drawn and len(silent) < len(runs)]


def _incident_steps(run: ReportedRun) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row in run.incidents:
        if isinstance(row.get("step"), int):
            found.setdefault(str(row["kind"]), []).append(row["step"])
    return found


def _sweep_charts(runs: Sequence[ReportedRun], winner: ReportedRun, png: bool) -> list[Picture]:
    """Draw the final loss by each numeric setting that differs."""
    losses_of = compared_losses([run.standing for run in runs])
    known = [(run, loss) for run, loss in zip(runs, losses_of, strict=True) if loss is not None and not run.fault]
    values = differences([run for run, _ in known])
    numeric = {key: each for key, each in values.items() if all(_is_number(value) for value in each)}
    best = next((at for at, (run, _) in enumerate(known) if run is winner), None)
    losses, shown = [loss for _, loss in known], list(numeric.items())[:SETTINGS]
    return [sweep_chart(numbers, losses, key, best, png=png) for key, numbers in shown]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _draw(page: Page, runs: Sequence[ReportedRun]) -> None:
    """Add drawings of mixtures and pipelines."""
    kinds: tuple[tuple[str, Callable[[ReportedRun], tuple[list[Picture], str]]], ...] = (
        ("Pipeline", pipeline_drawing),
        ("Experts", expert_drawings),
    )
    for title, draw in kinds:
        found = [draw(run) for run in runs[:DRAWN]]
        pictures = [picture for each, _ in found for picture in each]
        if pictures:
            page.drawings.append((title, pictures))
        page.notes += [why for _, why in found if why]
    if len(runs) > DRAWN:
        page.notes.append(f"pipelines and experts of {counted(len(runs) - DRAWN, 'further run')}: make a report of each")


def render(page: Page, *, refresh: float | None = None) -> str:
    """Return the page as HTML. refresh: seconds after which a browser reads it again; None: it is a file."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = _data_uri
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(page=page, refresh=refresh)


def _data_uri(picture: Picture) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.svg).decode()}"
