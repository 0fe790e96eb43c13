"""A whole run that hops between engines, stages, offloading and numbers of processes, against one that stays where it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")

# Imported here so that the ranks, which are forked from this process, need not.
import deepspeed.runtime.zero.muon.original_muon
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401

from meshloom.launch.checkpoint import main as checkpoint
from meshloom.parallel.deepspeed.optimizer import require_op
from meshloom.parallel.deepspeed.setup import import_deepspeed
from meshloom.trainer.run import run
from support.configs import resolve_words
from support.deepspeed_runs import asynchronous_io_is_built
from support.ranks import run_ranks

TINY = [
    "recipe=quickstart",
    "data=synthetic",
    "data.vocabulary=61",
    "data.seq_len=16",
    "data.validation_samples=8",
    "model.dim=24",
    "model.layers=2",
    "model.heads=4",
    "model.kv_heads=2",
    "model.ffn_dim=36",
    "batch.samples=8",
    "batch.micro=2",
    "precision=fp32",
    "schedule=constant",
    "schedule.warmup=2",
    "checkpoint.every=3",
    "trainer.eval_every=3",
    "trainer.eval_samples=8",
    "trainer.sample_prompt=null",
    "logging.progress=false",
    "resume=auto",
]
HOPS = [
    (4, ["parallel.engine=torch", "parallel.zero=3"]),
    (2, ["parallel.engine=deepspeed", "parallel.zero=1"]),
    (4, ["parallel.engine=deepspeed", "parallel.zero=3", "parallel.offload=cpu"]),
    (2, ["parallel.engine=torch", "parallel.zero=1", "parallel.offload=none", "parallel.tp=2"]),
]


def body(rank: int, world_size: int, overrides: list[str]) -> int:
    return run(resolve_words([], overrides, world_size))


def go(ranks: int, folder: Path, *overrides: str) -> None:
    assert run_ranks(ranks, body, [*TINY, f"output_dir={folder}", *overrides]) == [0] * ranks


def rows(folder: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def test_a_run_hops_between_engines_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Asynchronous checkpoints carry it; fp32, tolerance as in test_deepspeed.py."""
    go(1, tmp_path / "stays", "trainer.steps=12", "parallel.zero=0")
    for number, (ranks, hop) in enumerate(HOPS, 1):
        go(ranks, tmp_path / "hops", f"trainer.steps={3 * number}", *hop)
    for key in ("loss", "grad_norm", "eval_loss", "lr"):
        expected = rows(tmp_path / "stays", key)
        assert rows(tmp_path / "hops", key) == pytest.approx(expected, rel=1e-5), key
    assert len(rows(tmp_path / "hops", "loss")) == 12


def test_a_batch_controller_that_measures_runs_on_deepspeed(tmp_path: Path) -> None:
    """The number of micro-batches grows with the batch, without a new engine; statistics are the torch engine's."""
    grow = ["trainer.steps=6", "batch=norm_test", "batch.samples=4", "batch.micro=1"]
    go(1, tmp_path / "torch", *grow, "parallel.zero=0")
    go(2, tmp_path / "deepspeed", *grow, "parallel.engine=deepspeed", "parallel.zero=2")
    for key in ("loss", "batch_samples", "gradient_variance"):
        assert rows(tmp_path / "deepspeed", key) == pytest.approx(rows(tmp_path / "torch", key), rel=1e-4), key


@pytest.mark.skipif(not asynchronous_io_is_built(), reason="DeepSpeed's async_io has not been built on this machine")
def test_nvme_recipe_fine_tunes_imported_weights_then_resumes(tmp_path: Path) -> None:
    """Wide enough that shards do go to the disk. In fp32, where the torch engine is the oracle; the state never lies in memory
    whole, neither when it is saved (`checkpoint.snapshot_folder`) nor when it is restored.
    """
    import_deepspeed("cpu")
    require_op("AsyncIOBuilder", "", "")  # here, so that the ranks find it loaded
    wide = [
        "data.vocabulary=512",
        "model.vocabulary=512",
        "model.tied=false",
        "model.dim=256",
        "model.layers=3",
        "model.ffn_dim=768",
        "optim.lr=1e-3",
        "resume=none",
    ]
    go(1, tmp_path / "pretrained", *wide, "trainer.steps=3", "parallel.zero=0")
    universal = ["export", str(tmp_path / "pretrained"), str(tmp_path / "universal"), "--format", "universal"]
    assert checkpoint(universal) == 0
    # Without the run's own state in it, it is a stranger's folder, whose weights alone are taken.
    for path in (tmp_path / "universal").glob("*/*model_states.pt"):
        content = torch.load(path, weights_only=False)
        torch.save({key: value for key, value in content.items() if key != "meshloom"}, path)
    assert checkpoint(["import", str(tmp_path / "universal"), str(tmp_path / "imported")]) == 0

    disk = tmp_path / "disk"
    own = [word for word in TINY if word != "recipe=quickstart"]
    tune = ["recipe=finetune_nvme", *own, *wide, f"resume={tmp_path / 'imported'}", "schedule.warmup=0", "batch.micro=2"]

    def run_on(ranks: int, name: str, *words: str) -> None:
        assert run_ranks(ranks, body, [*tune, f"output_dir={tmp_path / name}", *words]) == [0] * ranks

    groups = "parallel.deepspeed.config.zero_optimization.sub_group_size=400000"
    run_on(1, "nvme", f"parallel.offload_path={disk}", "trainer.steps=3", groups)
    run_on(1, "nvme", f"parallel.offload_path={disk}", "trainer.steps=4", "resume=auto")
    assert [path for path in disk.iterdir() if not path.name.startswith("meshloom-rank0-")] == []  # no snapshot is left
    run_on(2, "nvme", "trainer.steps=6", "resume=auto", "parallel.zero=3", *ELSEWHERE)
    run_on(1, "torch", "trainer.steps=6", "parallel.zero=0", *ELSEWHERE)
    found, expected = (rows(tmp_path / name, "loss") for name in ("nvme", "torch"))
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(found) == 6


ELSEWHERE = [
    "parallel.engine=torch",
    "parallel.offload=none",
    "parallel.offload_weights=none",
    "parallel.offload_path=null",
    "checkpoint.snapshot_folder=null",
]
