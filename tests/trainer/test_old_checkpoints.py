"""Checkpoints that older versions saved: each resumes with the losses that its version recorded."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.ranks import run_ranks
from support.tiny_run import train

FIXTURES = Path(__file__).parents[1] / "fixtures"
SAVED = 6  # the step whose checkpoint is in the archives
COMMON = (
    "recipe=quickstart data=synthetic data.seq_len=8 data.vocabulary=31 model.vocabulary=31 model.dim=16 model.layers=2 "
    "model.heads=2 model.kv_heads=1 model.ffn_dim=24 precision=fp64 batch.samples=8 batch.micro=2 trainer.eval_every=0 "
    "trainer.sample_prompt=null logging.progress=false optim.lr=1e-2 trainer.steps=10 checkpoint.keep=0 checkpoint.every=3"
)


@dataclass(frozen=True)
class OldRun:
    """ranks: it was saved on; words: that it was started with, after COMMON; elsewhere: another layout to resume on."""

    ranks: int
    words: str
    elsewhere: tuple[int, str] | None = None
    archive: str = "checkpoints_2026_11"


RUNS = {
    "adamw_format_1": OldRun(
        2, "parallel.zero=3 model.tied=false", (2, "parallel.zero=1 parallel.tp=2"), archive="checkpoint_format_1"
    ),
    "adamw_zero3": OldRun(2, "parallel.zero=3 model.tied=false", (4, "parallel.zero=1 parallel.tp=2")),
    "adamw_tied_pp2": OldRun(2, "parallel.pp=2 model.tied=true", (1, "parallel.pp=1 parallel.zero=0")),
    "norm_test_zero1": OldRun(
        2, "batch=norm_test batch.samples=8 batch.micro=2 batch.max=32 batch.multiple=8 batch.interval=1 parallel.zero=1"
    ),
    "agvm": OldRun(1, "optim=agvm optim.lr=1e-2 optim.interval=2"),
    "lamb_tp2": OldRun(2, "optim=lamb optim.lr=1e-2 parallel.tp=2"),
    "power_ramp": OldRun(
        1, "schedule=power batch=ramp batch.samples=8 batch.micro=2 batch.max=16 trainer.steps=null trainer.tokens=2000"
    ),
}
CASES = [
    *[pytest.param(name, run.ranks, "", id=name) for name, run in RUNS.items()],
    *[pytest.param(name, *run.elsewhere, id=f"{name}, elsewhere") for name, run in RUNS.items() if run.elsewhere],
]


def rows(folder: Path) -> dict[int, tuple[float, float, int]]:
    """Step → loss, gradient norm, samples, of the steps after the checkpoint."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line and line["step"] > SAVED]
    return {line["step"]: (line["loss"], line["grad_norm"], line["batch_samples"]) for line in steps}


@pytest.mark.parametrize(("name", "ranks", "layout"), CASES)
def test_an_old_run_resumes_with_the_recorded_losses(tmp_path: Path, name: str, ranks: int, layout: str) -> None:
    with tarfile.open(FIXTURES / f"{RUNS[name].archive}.tar.xz") as archive:
        archive.extractall(tmp_path, [m for m in archive if m.name.startswith(f"./{name}/")], filter="data")
    folder = tmp_path / name / "run"
    recorded = rows(folder)
    (folder / "metrics.jsonl").unlink()
    words = f"{COMMON} {RUNS[name].words} {layout} output_dir={folder} resume=auto".split()
    assert run_ranks(ranks, train, words) == [0] * ranks
    found = rows(folder)
    assert found.keys() == recorded.keys() and len(found) >= 4
    for step, numbers in recorded.items():
        assert found[step] == pytest.approx(numbers, rel=1e-9), f"step {step}"
