"""Curves of a report: what is read, thinned and averaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from meshloom.launch.report.curves import Curve, curve
from meshloom.launch.run_metrics import Metrics
from support.run_folders import step_row


def test_thinning_keeps_every_spike_and_both_ends() -> None:
    y = np.sin(np.arange(100_000) / 5000)
    spikes = {17: 9.0, 50_000: -7.0, 77_777: 5.0}
    for at, value in spikes.items():
        y[at] = value
    thinned = Curve(np.arange(100_000.0), y).thinned(800)
    points = dict(zip(thinned.x.astype(int).tolist(), thinned.y.tolist(), strict=True))
    assert len(thinned) <= 802
    assert {at: points.get(at) for at in spikes} == spikes
    assert thinned.x[0] == 0 and thinned.x[-1] == 99_999 and np.all(np.diff(thinned.x) > 0)


def test_averages_are_those_of_numpy_inside_and_cut_off_at_the_end() -> None:
    y = np.random.default_rng(1).normal(size=200)
    found = Curve(np.arange(200.0), y).smoothed(0.05).y  # five values to either side
    np.testing.assert_allclose(found[5:-5], np.convolve(y, np.full(11, 1 / 11), "valid"), rtol=1e-12)
    np.testing.assert_allclose([found[0], found[1], found[-1]], [y[0], y[:3].mean(), y[-6:].mean()], rtol=1e-12)
    assert len(Curve(np.array([]), np.array([])).smoothed()) == 0


def test_steps_taken_again_count_once_and_torn_rows_not_at_all(tmp_path: Path) -> None:
    first, again = [step_row(step) for step in range(1, 6)], [step_row(step, loss=1.0, step_seconds=0.3) for step in (4, 5, 6)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*map(json.dumps, [*first, *again]), '{"step": 7, "lo']))
    metrics = Metrics.read(path)
    steps, losses = metrics["loss"]
    assert steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert losses.tolist() == [4.0, 8 / 3, 2.0, 1.0, 1.0, 1.0]
    np.testing.assert_allclose(metrics.seconds, [0.1, 0.2, 0.3, 0.6, 0.9, 1.2])
    assert curve(metrics, "loss", "samples").x.tolist() == [10, 20, 30, 40, 50, 60]


def test_evaluations_lie_between_rows_of_steps_and_lost_losses_have_no_point() -> None:
    rows = [step_row(1), step_row(10, step_seconds=0.2), {"step": 5, "eval_loss": 3.0}, step_row(20)]
    del rows[-1]["loss"]  # not finite
    metrics = Metrics(rows)
    assert curve(metrics, "eval_loss", "tokens").x.tolist() == [5000]
    assert len(curve(metrics, "loss")) == 2
    np.testing.assert_allclose(metrics.seconds, [0.1, 0.1 + 9 * 0.2, 0.1 + 9 * 0.2 + 10 * 0.1])  # rows stand for those before
    assert len(curve(Metrics([]), "loss", "tokens")) == 0


def test_the_evaluations_of_a_step_are_one_row() -> None:
    rows = [{"step": 4, "eval_loss": 3.0}, {"step": 2, "eval_loss": 4.0}, {"step": 4, "tasks/opposites/acc": 0.5}]
    assert Metrics(rows).evaluations == [
        {"step": 2, "eval_loss": 4.0},
        {"step": 4, "eval_loss": 3.0, "tasks/opposites/acc": 0.5},
    ]
    assert Metrics(rows)["tasks/opposites/acc"][1].tolist() == [0.5]
