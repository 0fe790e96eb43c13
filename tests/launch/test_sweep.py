"""Jobs of a sweep as Hydra hands them on."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshloom.launch.sweep import run_sweep
from meshloom.launch.sweep_results import rows


def test_a_fixed_key_of_the_swept_options_reaches_every_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`batch.max` is no key of the recipe's own option."""
    monkeypatch.chdir(tmp_path)  # Hydra writes the sweep's folder
    jobs: list[list[str]] = []

    def run(overrides: list[str]) -> tuple[int | None, int]:
        jobs.append(overrides)
        return 0, 0

    words = ["recipe=quickstart", "batch=norm_test,noise_scale", "batch.max=64", "output_dir=there"]
    assert [outcome.code for outcome in run_sweep(words, None, run)] == [0, 0]
    for job, option in zip(jobs, ("norm_test", "noise_scale"), strict=True):
        assert {f"batch={option}", "batch.max=64"} <= set(job)
        assert job[-1] == f"output_dir='there/sweep/batch={option}'"


def test_a_run_that_diverged_comes_last(tmp_path: Path) -> None:
    """A number that is not finite is not written: what is left of such a run may look best. One that went on is as others.

    "young" has not been evaluated, as the others have: a training loss is not compared with theirs.
    """
    step = '"tokens_per_second": 1.0'
    written = {
        "diverged": [
            f'{{"step": 9999, "loss": 1.0, {step}}}',
            '{"step": 9999, "eval_loss": 1.0}',
            f'{{"step": 12340, {step}}}',
        ],
        "good": [f'{{"step": 12345, "loss": 2.5, {step}}}', '{"step": 12345, "eval_loss": 2.25}'],
        "recovered": [f'{{"step": 12345, {step}}}', '{"step": 12345, "eval_loss": 2.0}'],
        "young": [f'{{"step": 3, "loss": 1.5, {step}}}'],
    }
    for name, lines in written.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert rows(tmp_path) == [
        "recovered  step 12,345  eval_loss 2",
        "good  step 12,345  loss 2.5  eval_loss 2.25",
        "young  step 3  loss 1.5",
        "diverged  step 12,340  loss nan  eval_loss 1",
    ]
