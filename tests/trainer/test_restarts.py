"""A job that is started again goes on with the run that it began, and only with that."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshloom.checkpoint.identity import RunIdentity
from meshloom.trainer.find_checkpoint import continues_own_run
from meshloom.trainer.identity import take_over_metrics

SCHEDULERS = [("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (name for pair in SCHEDULERS for name in pair):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(("job", "count"), SCHEDULERS)
@pytest.mark.parametrize("resume", ["none", "elsewhere/step-00000004"])
def test_only_a_job_that_began_the_run_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, count: str, resume: str
) -> None:
    monkeypatch.setenv(job, "17")
    monkeypatch.setenv(count, "0")
    take_over_metrics(tmp_path, RunIdentity.new())
    assert not continues_own_run(resume, tmp_path), "a first start begins where it was asked"
    monkeypatch.setenv(count, "1")
    assert continues_own_run(resume, tmp_path)
    monkeypatch.setenv(job, "18")
    assert not continues_own_run(resume, tmp_path), "it was stopped before it took the folder over from job 17"
    take_over_metrics(tmp_path, RunIdentity.new())
    assert continues_own_run(resume, tmp_path)


def test_auto_always_goes_on(tmp_path: Path) -> None:
    assert continues_own_run("auto", tmp_path) and continues_own_run("auto:there", tmp_path)
    assert not continues_own_run("none", tmp_path)
