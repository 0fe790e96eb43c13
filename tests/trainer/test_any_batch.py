"""A batch that divides by nothing: the same run on 1, 2 and 3 processes, and what is said of its blanks."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from meshloom.config.duration import Duration
from meshloom.data.assignment import Assigner
from meshloom.optim.batch.config import FixedConfig
from meshloom.optim.batch.controller import Fixed
from meshloom.optim.horizon import Horizon
from meshloom.optim.progress import Progress
from meshloom.trainer.blanks import blank_notice
from support.ranks import run_ranks
from support.tiny_run import body

NINE = ["batch.samples=9", "batch.micro=2", "trainer.eval_every=2", "trainer.eval_samples=7", "checkpoint.every=4"]


def said(rank: int, world_size: int, overrides: list[str]) -> list[str]:
    """Return what the start of a run says."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("meshloom.trainer.run").addHandler(handler)
    assert body(rank, world_size, overrides) == 0
    return messages


def train(ranks: int, folder: Path, *overrides: str) -> tuple[list[str], list[str]]:
    """Return what the first and the second rank said."""
    found = run_ranks(ranks, said, [f"output_dir={folder}", *NINE, *overrides])
    return found[0], found[-1]


def numbers(folder: Path) -> list[tuple[int, float]]:
    """Losses of steps and of evaluations, by step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[key]) for row in rows for key in ("loss", "eval_loss") if key in row]


@pytest.mark.parametrize("layout", [["parallel.zero=1"], ["parallel.zero=3"]])
def test_nine_samples_on_three_processes_and_then_on_two(tmp_path: Path, layout: list[str]) -> None:
    """Five micro-batches of two, the last with one sample; the evaluation has four."""
    train(1, tmp_path / "whole", "trainer.steps=8")
    train(3, tmp_path / "cut", "trainer.steps=4", *layout)
    train(2, tmp_path / "cut", "trainer.steps=8", "resume=auto", *layout)
    expected, found = numbers(tmp_path / "whole"), numbers(tmp_path / "cut")
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-9)


def test_nine_samples_through_a_pipeline(tmp_path: Path) -> None:
    """`interleaved` can't run five micro-batches on two ranks, so a sixth one is blank."""
    deep = ["model.layers=4", "trainer.steps=4"]
    train(1, tmp_path / "whole", *deep)
    train(2, tmp_path / "pp", *deep, "parallel.pp=2", "parallel.schedule=interleaved")
    expected, found = numbers(tmp_path / "whole"), numbers(tmp_path / "pp")
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-9)


def test_agvm_compares_the_same_halves_of_nine_samples(tmp_path: Path) -> None:
    """Two micro-batches of five are the first half; on three processes, a rank has a blank one in its place."""
    agvm = ["optim=agvm", "optim.interval=1", "optim.smoothing=0.5", "optim.lr=0.02", "trainer.steps=4"]
    train(1, tmp_path / "whole", *agvm)
    train(3, tmp_path / "spread", *agvm, "parallel.zero=2")
    expected, found = numbers(tmp_path / "whole"), numbers(tmp_path / "spread")
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-9)


def test_the_start_says_once_what_is_blank(tmp_path: Path) -> None:
    first, second = train(2, tmp_path, "trainer.steps=3")
    (notice,) = [message for message in first if "blank" in message]
    assert notice.startswith("batch.samples: 25% of the rows of a step are blank")
    assert notice.endswith("batches of 8 or 12 samples have no blanks")
    assert not any("blank" in message for message in second)
    first, _ = train(2, tmp_path / "even", "trainer.steps=3", "batch.samples=8")
    assert not any("blank" in message for message in first)


def test_a_notice_has_the_rows_of_a_pipeline_too() -> None:
    controller = Fixed(FixedConfig(samples=6, micro=2), Horizon(Duration.parse("10 steps"), 16))
    assert blank_notice(Assigner(1), controller, Progress()) is None
    notice = blank_notice(Assigner(1, lambda passes: passes >= 4), controller, Progress())
    assert notice is not None and notice.startswith("25% of the rows") and "batches of 8 samples have no blanks" in notice
