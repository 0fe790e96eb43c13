"""Runs that write files of hosts (`checkpoint.files=host`), stopped and resumed by ranks that believe to be on others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from meshloom.parallel import hosts
from support import tiny_run
from support.ranks import run_ranks

PER_HOST = 2


def body(rank: int, world_size: int, overrides: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "host_name", lambda: f"host {int(os.environ['RANK']) // PER_HOST}")
        return tiny_run.body(rank, world_size, overrides)


def go(ranks: int, folder: Path, *overrides: str) -> None:
    assert run_ranks(ranks, body, [f"output_dir={folder}", *overrides]) == [0] * ranks


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_goes_on_from_files_of_hosts_on_other_layouts(tmp_path: Path) -> None:
    go(1, tmp_path / "whole", "trainer.steps=4", "checkpoint.every=0")
    go(4, tmp_path / "cut", "trainer.steps=2", "parallel.zero=3", "checkpoint.files=host", "checkpoint.mode=async")
    go(2, tmp_path / "cut", "trainer.steps=3", "parallel.tp=2", "resume=auto")
    go(3, tmp_path / "cut", "trainer.steps=4", "parallel.zero=1", "resume=auto", "checkpoint.files=rank")
    found = {
        step.name: sorted(path.name for path in step.iterdir() if path.suffix not in (".json", ".model"))
        for step in (tmp_path / "cut/checkpoints").glob("step-*")
    }
    assert found["step-00000002"] == ["host-00000.segments", "host-00002.segments"]
    assert found["step-00000003"] == ["host-00000.segments"], "a habit that stays until another is typed"
    assert found["step-00000004"] == [f"rank-0000{rank}.{kind}" for rank in range(3) for kind in ("leaves", "safetensors")]
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-9, abs=0)
