"""A batch that is changed on a resume moves nothing that lies behind: the run's rates, and what they are coupled to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from meshloom.checkpoint.restore import read_state
from support.ranks import run_ranks
from support.tiny_run import body

TOKENS = 16
WORDS = [
    "trainer.steps=null",
    "schedule=cosine",
    "schedule.warmup=4",
    "schedule.final=0",
    "optim.lr=0.003",
    "trainer.eval_every=0",
]
STOP = "trainer.hooks=[{_target_:support.run_hooks.Signal,step:21,rank:0,name:SIGTERM}]"


def go(ranks: int, folder: Path, *overrides: str) -> None:
    assert run_ranks(ranks, body, [f"output_dir={folder}", *WORDS, *overrides]) == [0] * ranks


def rates(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["lr"] for line in lines if "lr" in line}


@pytest.mark.parametrize("coupling", ["none", "sqrt"])
def test_a_doubled_batch_keeps_the_warm_up_and_the_first_batch(tmp_path: Path, coupling: str) -> None:
    """Ten steps of 8 samples, then 16: the warm-up of 4 steps ended after 32 samples, and B₀ stays 8."""
    whole = 30 * 8 * TOKENS
    go(1, tmp_path, f"trainer.tokens={10 * 8 * TOKENS}", f"optim.lr_coupling={coupling}")
    go(2, tmp_path, f"trainer.tokens={whole}", "resume=auto", "batch.samples=16")
    found, growth = rates(tmp_path), math.sqrt(2) if coupling == "sqrt" else 1.0
    for step in range(11, 21):
        samples = 80 + 16 * (step - 11)
        part = (samples - 32) / (240 - 32)
        assert found[step] == pytest.approx(growth * 0.003 * (1 + math.cos(math.pi * part)) / 2, rel=1e-12)
    history = read_state(tmp_path / "checkpoints")["progress"]["history"]
    assert history == [[0, 0, 0, 8], [10, 80, 80 * TOKENS, 16]]
    go(1, tmp_path, f"trainer.tokens={2 * whole}", "resume=auto", "batch.samples=8", STOP)
    assert rates(tmp_path)[21] == pytest.approx(0.003 * (1 + math.cos(math.pi * (240 - 32) / (480 - 32))) / 2, rel=1e-12)
