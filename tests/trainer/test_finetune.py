"""A run that begins from imported weights: those alone are taken, and it starts at step 0 with a config of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.convert.compose import Source, compose
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import open_step
from meshloom.checkpoint.reading.compare import read_array
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import Engine
from meshloom.trainer.run import run
from support.configs import resolve_words
from support.parity import Work, build
from support.ranks import run_ranks
from support.tiny_run import TINY

WORK = Work(ParallelConfig(zero=0), precision="fp32", model=(("dim", 16), ("heads", 2), ("kv_heads", 1), ("ffn_dim", 24)))


def imported(rank: int, world_size: int, folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint such as `meshloom checkpoint import` makes, of this seed's initial weights and some moments."""
    engine: Engine = build(WORK, world_size)
    engine.prepare_restore()
    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync"))
    checkpointer.save(0, engine.fragments(), {"imported_from": {"format": "deepspeed zero 2"}})
    checkpointer.finish()
    return {fragment.name: fragment.tensor.clone() for fragment in engine.fragments() if fragment.role == "weight"}


def tuned(rank: int, world_size: int, overrides: list[str]) -> int:
    own = ["precision=fp32", "batch.samples=8", "trainer.eval_every=1", "schedule.warmup=0", "model.tied=false"]
    return run(resolve_words([*TINY, *own], overrides, world_size))


@pytest.mark.parametrize(("ranks", "engine"), [(1, "torch"), (2, "torch"), (2, "deepspeed")])
def test_training_begins_with_the_imported_weights(tmp_path: Path, ranks: int, engine: str) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")
    weights = run_ranks(1, imported, tmp_path / "imported")[0]
    folder = f"output_dir={tmp_path / 'tuned'}"
    start = [folder, f"resume={tmp_path / 'imported'}", f"parallel.engine={engine}", "trainer.steps=1", "optim.lr=1e-30"]
    assert run_ranks(ranks, tuned, start) == [0] * ranks
    (step,) = (tmp_path / "tuned" / "checkpoints").glob("step-*")
    assert step.name == "step-00000001"
    files = open_files(step)
    manifest = open_step(files)
    for name, weight in weights.items():
        assert torch.equal(read_array(files, manifest, f"weight/{name}"), weight), name
    rows = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1]


def test_a_shape_of_another_model_is_refused_by_key(tmp_path: Path) -> None:
    run_ranks(1, imported, tmp_path / "imported")
    start = [f"output_dir={tmp_path / 'tuned'}", f"resume={tmp_path / 'imported'}", "trainer.steps=1", "model.layers=3"]
    with pytest.raises(AssertionError, match=r"model\.layers: is 3, and the checkpoint's model has 2"):
        run_ranks(2, tuned, start)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm.weight": None}, r"does not have this model's weights \(weight/norm\.weight\)"),
        ({"norm.bias": (16,)}, r"has weights that this model does not have \(weight/norm\.bias\)"),
    ],
)
def test_weights_that_no_key_tells_are_compared_by_name(
    tmp_path: Path, changed: dict[str, tuple[int, ...] | None], message: str
) -> None:
    weights = run_ranks(1, imported, tmp_path / "whole")[0]
    weights |= {name: torch.zeros(shape) for name, shape in changed.items() if shape is not None}
    sources = [
        Source(name, "weight", weight.dtype, tuple(weight.shape), lambda kept=weight: kept)
        for name, weight in weights.items()
        if changed.get(name, ()) is not None
    ]
    compose(tmp_path / "imported", 0, sources, {"imported_from": {"format": "dcp"}})
    start = [f"output_dir={tmp_path / 'tuned'}", f"resume={tmp_path / 'imported'}", "trainer.steps=1"]
    with pytest.raises(AssertionError, match=message):
        run_ranks(2, tuned, start)
