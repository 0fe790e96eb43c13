"""`trainer.profile_step`, and how long a step is said to have taken."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.data.build import build_node
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from meshloom.trainer import loop as loops
from meshloom.trainer.build import build_run
from meshloom.trainer.hooks.base import Hook
from meshloom.trainer.run import run
from support.configs import config_of, resolve_words
from support.ranks import run_ranks

TINY = [
    "recipe=quickstart",
    "data=synthetic",
    "data.vocabulary=61",
    "data.seq_len=16",
    "data.validation_samples=12",
    "model.dim=16",
    "model.layers=2",
    "model.heads=2",
    "model.kv_heads=1",
    "model.ffn_dim=24",
    "batch.samples=4",
    "batch.micro=2",
    "schedule=constant",
    "schedule.warmup=2",
    "trainer.sample_prompt=null",
    "trainer.steps=5",
    "trainer.eval_every=2",
    "checkpoint.every=0",
    "logging.progress=false",
]


def train(rank: int, world_size: int, overrides: list[str]) -> int:
    return run(resolve_words(TINY, overrides, world_size))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_profile_is_of_one_whole_step_and_changes_nothing(tmp_path: Path, ranks: int) -> None:
    losses: list[list[float]] = []
    for name, more in (("plain", []), ("profiled", ["trainer.profile_step=3"])):
        assert run_ranks(ranks, train, [f"output_dir={tmp_path / name}", *more]) == [0] * ranks
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1]
    assert not (tmp_path / "plain" / "profile").exists()
    folder = tmp_path / "profiled" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["step-3.json.gz", "step-3.txt"]
    names = [
        event.get("name", "") for event in json.loads(gzip.decompress((folder / "step-3.json.gz").read_bytes()))["traceEvents"]
    ]
    # One forward and backward pass a micro-batch: as many embeddings looked up as gradients of them made.
    assert names.count("aten::embedding") == names.count("aten::embedding_dense_backward") == 2 // ranks
    assert "aten::embedding" in (folder / "step-3.txt").read_text()


@pytest.mark.parametrize("step", [0, 6])
def test_a_step_that_there_will_not_be_is_refused(step: int) -> None:
    (problem,) = config_of(*TINY, f"trainer.profile_step={step}").problems()
    assert problem.key == "trainer.profile_step" and f"no step {step} of 5" in problem.message


class Queued:
    """Stands for the device's clock, which shows how many steps were queued before the moment."""

    steps = 0

    def __init__(self, device: torch.device) -> None:
        self.at = Queued.steps

    def seconds_since(self, earlier: Queued) -> float:
        return float(self.at - earlier.at)


class CountSteps(Hook):
    """Its `on_step_begin` is where a step's work is queued."""

    def on_step_begin(self, loop: loops.Loop) -> None:
        Queued.steps += 1


def test_every_row_has_one_steps_seconds_after_evaluation_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "DeviceTimestamp", Queued)
    hook = f"trainer.hooks=[{{_target_:{__name__}.CountSteps}}]"
    assert run_ranks(1, train, [f"output_dir={tmp_path}", hook]) == [0]
    lines: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step_seconds"] for line in lines if "loss" in line] == [1.0] * 5
    assert [line["tokens_per_second"] for line in lines if "loss" in line] == [64.0] * 5


def by_hand(rank: int, world_size: int, folder: str) -> list[float]:
    """Losses of two steps taken as a benchmark takes them."""
    config = config_of(*TINY, f"output_dir={folder}")
    data = build_node(config.data, config.seed, config.model.vocabulary)
    data.prepare()
    mesh = Mesh.connect(Layout.plan(ParallelConfig(), 1), torch.device("cpu"))
    loop = build_run(config, {}, data, mesh).loop
    losses: list[float] = []
    for _ in range(2):
        loop.step()
        loop.deliver_metrics(keep=0)
        losses.append(loop._last_loss)
    return losses


def test_steps_can_be_taken_without_the_loop_around_them(tmp_path: Path) -> None:
    (losses,) = run_ranks(1, by_hand, str(tmp_path))
    assert len(set(losses)) == 2
