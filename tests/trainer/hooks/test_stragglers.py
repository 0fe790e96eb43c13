"""Slow ranks are named, and only those."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import Layout
from meshloom.trainer.hooks.stragglers import WINDOW, NameStragglers
from meshloom.trainer.watch.incidents import read_incidents
from support.ranks import run_ranks
from support.tiny_run import body

STEPS = 3 * WINDOW


def watch(folder: Path, own: list[list[float]], step_seconds: float = 1.0, **parallel: int) -> list[dict[str, Any]]:
    """Show a hook these ranks' own work, step by step. Returns the rows."""
    hook = NameStragglers()
    layout = Layout.plan(ParallelConfig(**parallel), len(own[0]))
    mesh = SimpleNamespace(layout=layout)
    loop: Any = SimpleNamespace(mesh=mesh, island=mesh, output_dir=folder, progress=SimpleNamespace(step=0))
    rows: list[dict[str, Any]] = []
    for step, each in enumerate(own, start=1):
        loop.own_work, loop.progress.step = each, step
        rows.append({"step_seconds": step_seconds})
        hook.on_metrics(loop, rows[-1])
    return rows


STORIES: dict[str, tuple[list[list[float]], dict[str, int], list[int]]] = {
    "one of four": ([[0.5, 0.5, 0.8, 0.52]] * STEPS, {}, [2]),
    "one of two": ([[0.8, 0.5]] * STEPS, {}, [0]),
    "two of five": ([[0.5, 0.9, 0.5, 0.9, 0.5]] * STEPS, {}, [1, 3]),
    "all alike": ([[0.5, 0.52, 0.55]] * STEPS, {}, []),
    "now and then": ([[0.5, 5.0 if step % 3 == 0 else 0.5, 0.5] for step in range(STEPS)], {}, []),
    "while it compiles": ([*[[90.0, 0.5, 0.5]] * 2, *[[0.5, 0.5, 0.5]] * STEPS], {}, []),
    "of little work": ([[0.001, 0.002, 0.001]] * STEPS, {}, []),
    "a longer stage": ([[0.5, 0.5, 0.9, 0.9]] * STEPS, {"pp": 2}, []),
    "one in a longer stage": ([[0.5, 0.5, 0.9, 1.2]] * STEPS, {"pp": 2}, [3]),
}


@pytest.mark.parametrize("name", STORIES)
def test_who_is_slow(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own, parallel, slow = STORIES[name]
    watch(tmp_path, own, **parallel)
    incidents = list(read_incidents(tmp_path))
    assert sorted(each["rank"] for each in incidents) == slow and {each["kind"] for each in incidents} <= {"straggler"}
    assert len(caplog.records) == len(slow) and all(f"rank {rank} is slow" in caplog.text for rank in slow)


def test_rows_have_the_slowest_rank(tmp_path: Path) -> None:
    rows = watch(tmp_path, [[0.3, 0.7, 0.4]] * 5)
    assert rows[1] == {"step_seconds": 1.0}
    assert rows[4] == {"step_seconds": 1.0, "own_seconds": 0.4, "own_seconds_slowest": 0.7, "slowest_rank": 1}
    assert watch(tmp_path, [[0.3]] * 5)[4] == {"step_seconds": 1.0}


@pytest.mark.parametrize("zero", range(4))
def test_a_rank_whose_forward_pass_is_slow_is_named(zero: int, tmp_path: Path) -> None:
    """The other waits for it in its own passes, where gradients are summed and weights gathered."""
    slow = "trainer.hooks=[{_target_: support.run_hooks.Slow, rank: 1, seconds: 0.03}]"
    words = [slow, f"trainer.steps={WINDOW + 4}", "trainer.eval_every=0", "checkpoint.every=0", f"output_dir={tmp_path}"]
    assert run_ranks(2, body, ["trainer.tokens=null", f"parallel.zero={zero}", *words]) == [0, 0]
    (incident,) = read_incidents(tmp_path)
    pids = {row["rank"]: row["pid"] for row in json.loads((tmp_path / "ranks.json").read_text())}
    assert (incident["kind"], incident["rank"], incident["pid"]) == ("straggler", 1, pids[1])
    assert incident["details"]["own_seconds"] > 0.05 + incident["details"]["usual_seconds"] / 2
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    waits = [row["own_seconds_slowest"] - row["own_seconds"] for row in rows if "slowest_rank" in row]
    assert len(waits) > 10 and sorted(waits)[len(waits) // 2] > 0.03
