"""A run with experts goes on from its checkpoint as if it had not stopped, on other layouts too; and what its metrics say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.ranks import run_ranks
from support.tiny_run import body

EXPERTS = "model.experts={count:4,top_k:2,ffn_dim:8,scores:sigmoid,bias:true,dense_layers:1}"
WORDS = [
    *(EXPERTS, "balance.global_batch=0.5", "balance.bias_rate=0.01", "model.layers=3", "trainer.eval_every=3"),
    *("checkpoint.every=2", "optim.lr=0.003", "trainer.sample_prompt=null"),
]


def go(ranks: int, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    assert run_ranks(ranks, body, [f"output_dir={folder}", *WORDS, *overrides]) == [0] * ranks
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(rows: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """By step, what does not depend on time."""
    names = ("loss", "grad_norm", "experts/")
    steps = [row for row in rows if "grad_norm" in row]
    return {row["step"]: {name: value for name, value in row.items() if name.startswith(names)} for row in steps}


def test_a_resume_on_other_layouts_goes_on_with_shares_and_biases(tmp_path: Path) -> None:
    whole = numbers(go(1, tmp_path / "whole", "trainer.steps=6"))
    cut = tmp_path / "cut"
    go(2, cut, "trainer.steps=2", "parallel.zero=3", "parallel.ep=2")
    go(4, cut, "trainer.steps=4", "parallel.tp=2", "parallel.zero=1", "parallel.ep=4", "resume=auto")
    found = numbers(go(2, cut, "trainer.steps=6", "parallel.pp=2", "resume=auto"))
    assert found.keys() == whole.keys()
    for step, row in whole.items():
        assert found[step] == pytest.approx(row, rel=1e-9, abs=1e-12), step
    assert {"experts/1/lbl", "experts/2/load_max", "experts/1/violation", "experts/1/entropy"} <= whole[1].keys()
    assert "experts/0/lbl" not in whole[1]
