"""Jobs of a sweep as Hydra hands them on."""

from __future__ import annotations

from meshloom.launch.sweep import run_sweep


def test_a_fixed_key_of_the_swept_options_reaches_every_job() -> None:
    """`batch.max` is no key of the recipe's own option."""
    jobs: list[list[str]] = []

    def run(overrides: list[str]) -> tuple[int | None, int]:
        jobs.append(overrides)
        return 0, 0

    words = ["recipe=quickstart", "batch=norm_test,noise_scale", "batch.max=64", "output_dir=there"]
    assert [outcome.code for outcome in run_sweep(words, None, run)] == [0, 0]
    for job, option in zip(jobs, ("norm_test", "noise_scale"), strict=True):
        assert {f"batch={option}", "batch.max=64"} <= set(job)
        assert job[-1] == f"output_dir='there/sweep/batch={option}'"
