"""Slow ranks are named, and only those."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meshloom.parallel.compute_time import StepWork
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import Layout
from meshloom.trainer.hooks import stragglers
from meshloom.trainer.hooks.stragglers import WINDOW, NameStragglers
from meshloom.trainer.watch.incidents import read_incidents
from support.ranks import run_ranks
from support.tiny_run import body

STEPS = 3 * WINDOW


def watch(
    folder: Path, work: list[list[StepWork]], counts: list[list[float]] | None = None, **parallel: int
) -> list[dict[str, Any]]:
    """Show a hook these ranks' work, step by step, each of a second. Returns the rows. counts: assignments of experts."""
    hook = NameStragglers()
    layout = Layout.plan(ParallelConfig(**parallel), len(work[0]))
    mesh, step_seconds = SimpleNamespace(layout=layout), 1.0
    engine = SimpleNamespace(assignments=lambda: torch.tensor(counts))
    loop: Any = SimpleNamespace(mesh=mesh, island=mesh, engine=engine, output_dir=folder, progress=SimpleNamespace(step=0))
    rows: list[dict[str, Any]] = []
    for step, each in enumerate(work, start=1):
        loop.work, loop.progress.step = each, step
        rows.append({"step_seconds": step_seconds})
        hook.on_metrics(loop, rows[-1])
    return rows


def own(*seconds: float) -> list[StepWork]:
    """Return a step of ranks that work so long."""
    return [StepWork(each, 0.0) for each in seconds]


def layers(*seconds: float, of: float = 1.0) -> list[StepWork]:
    """Return a step of the same own work, of which so much is in the forward passes of so many layers."""
    return [StepWork(0.9, 0.0, each, of) for each in seconds]


EP = {"ep": 2, "zero": 1}
STORIES: dict[str, tuple[list[list[StepWork]], dict[str, Any], list[int]]] = {
    "one of four": ([own(0.5, 0.5, 0.8, 0.52)] * STEPS, {}, [2]),
    "one of two": ([own(0.8, 0.5)] * STEPS, {}, [0]),
    "two of five": ([own(0.5, 0.9, 0.5, 0.9, 0.5)] * STEPS, {}, [1, 3]),
    "all alike": ([own(0.5, 0.52, 0.55)] * STEPS, {}, []),
    "now and then": ([own(0.5, 5.0 if step % 3 == 0 else 0.5, 0.5) for step in range(STEPS)], {}, []),
    "in two steps of three": ([own(0.5, 0.5 if step % 3 == 0 else 5.0, 0.5) for step in range(STEPS)], {}, []),
    "by turns": ([own(0.9, 0.5) if step % 2 else own(0.5, 0.9) for step in range(STEPS)], {}, []),
    "while it compiles": ([*[own(90.0, 0.5, 0.5)] * 2, *[own(0.5, 0.5, 0.5)] * STEPS], {}, []),
    "of little work": ([own(0.001, 0.002, 0.001)] * STEPS, {}, []),
    "a longer stage": ([own(0.5, 0.5, 0.9, 0.9)] * STEPS, {"pp": 2}, []),
    "one in a longer stage": ([own(0.5, 0.5, 0.9, 1.2)] * STEPS, {"pp": 2}, [3]),
    "a longer stage of one rank": ([own(0.5, 0.9)] * STEPS, {"pp": 2}, []),
    "a stage whose layers take longer": ([layers(0.1, 0.3, 0.1)] * STEPS, {"pp": 3}, [1]),
    "a stage whose layers vary": ([layers(0.1, 0.14, 0.1)] * STEPS, {"pp": 3}, []),
    "a stage with more layers": ([[*layers(0.1), *layers(0.3, of=3.0)]] * STEPS, {"pp": 2}, []),
    "a stage without such layers": ([[*layers(0.1, 0.0), *layers(0.1)]] * STEPS, {"pp": 3}, []),
    "experts that more have chosen": ([own(0.9, 0.5)] * STEPS, {**EP, "counts": [[30.0, 30.0, 20.0, 10.0]]}, []),
    "more than the tokens explain": ([own(0.9, 0.5)] * STEPS, {**EP, "counts": [[30.0, 12.0, 20.0, 20.0]]}, [0]),
    "slow, with fewer tokens": ([own(0.5, 0.9)] * STEPS, {**EP, "counts": [[30.0, 30.0, 20.0, 10.0]]}, [1]),
}


@pytest.mark.parametrize("name", STORIES)
def test_slow_ranks_are_named(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    work, parallel, slow = STORIES[name]
    watch(tmp_path, work, **parallel)
    incidents = list(read_incidents(tmp_path))
    assert sorted(each["rank"] for each in incidents) == slow and {each["kind"] for each in incidents} <= {"straggler"}
    assert len(caplog.records) == len(slow) and all(f"rank {rank} is slow" in caplog.text for rank in slow)


def test_layers_tell_how_much_of_a_stage_is_waited_for(tmp_path: Path) -> None:
    watch(tmp_path, [layers(0.1, 0.3)] * STEPS, pp=2)
    (incident,) = read_incidents(tmp_path)
    details = incident["details"]
    assert (details["own_seconds"], details["usual_seconds"]) == (0.9, pytest.approx(0.9 - (0.3 - 0.1)))


def test_rows_have_the_slowest_rank(tmp_path: Path) -> None:
    rows = watch(tmp_path, [own(0.3, 0.7, 0.4)] * 5)
    assert rows[1] == {"step_seconds": 1.0}
    assert rows[4] == {"step_seconds": 1.0, "own_seconds": 0.4, "own_seconds_slowest": 0.7, "slowest_rank": 1}
    assert watch(tmp_path, [own(0.3)] * 5)[4] == {"step_seconds": 1.0}


TWO = "batch.micro=4"
"""Samples a micro-batch where two ranks share all samples: two micro-batches a step, as where each rank has half of them."""
EXPERTS = "model.experts={count: 4, top_k: 2, ffn_dim: 8}"
SHORT = 10
"""Steps over which a rank is judged in runs that are slow on purpose."""
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    **{f"ZeRO-{zero}": (2, [f"parallel.zero={zero}"]) for zero in range(4)},
    "tensor parallelism": (2, [TWO, "parallel.tp=2"]),
    "a ring": (2, [TWO, "parallel.cp=2"]),
    "Ulysses": (2, [TWO, "parallel.cp=2", "parallel.cp_kind=ulysses"]),
    "a pipeline": (2, [TWO, "parallel.pp=2"]),
    "expert parallelism": (2, ["parallel.ep=2", EXPERTS]),
    "tensor and data parallelism": (4, ["parallel.tp=2", "parallel.zero=3"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_whose_forward_pass_is_slow_is_named(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for it in their own passes: for gradients, weights, and what is exchanged inside of layers."""
    ranks, parallel = LAYOUTS[layout]
    monkeypatch.setattr(stragglers, "WINDOW", SHORT)
    slow = "trainer.hooks=[{_target_: support.run_hooks.SlowLayer, rank: 1, seconds: 0.12}]"
    words = [slow, f"trainer.steps={SHORT + 4}", "trainer.eval_every=0", "checkpoint.every=0", f"output_dir={tmp_path}"]
    assert run_ranks(ranks, body, ["trainer.tokens=null", *parallel, *words]) == [0] * ranks
    (incident,) = read_incidents(tmp_path)
    pids = {row["rank"]: row["pid"] for row in json.loads((tmp_path / "ranks.json").read_text())}
    assert (incident["kind"], incident["rank"], incident["pid"]) == ("straggler", 1, pids[1])
    assert incident["details"]["own_seconds"] > 0.05 + incident["details"]["usual_seconds"] / 2
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    waits = [row["own_seconds_slowest"] - row["own_seconds"] for row in rows if "slowest_rank" in row]
    assert len(waits) >= SHORT and sorted(waits)[len(waits) // 2] > 0.03
