"""A run whose batch size follows its gradients: the same on other layouts, and stopped and resumed on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from meshloom.data.assignment import Share
from meshloom.launch.train import main
from meshloom.trainer.run import run
from support.configs import problems_of, resolve_words
from support.ranks import run_ranks

PLAIN = [
    "recipe=quickstart",
    "data=synthetic",
    "data.seq_len=16",
    "precision=fp64",
    *("model.vocabulary=64", "model.dim=16", "model.layers=2", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=32"),
    *("trainer.steps=null", "trainer.eval_every=0", "trainer.sample_prompt=null", "logging.progress=false"),
    *("schedule=constant", "schedule.warmup=512 tokens"),
]
TINY = [
    *PLAIN,
    "optim.lr_coupling=sqrt_saturating",
    *("batch=norm_test", "batch.samples=8", "batch.micro=2", "batch.max=64", "batch.eta=0.6"),
    *("batch.ema=0.5", "batch.growth=1.2", "batch.interval=3", "batch.shrink=false"),
]
ROW = ("step", "loss", "lr", "grad_norm", "samples", "batch_samples", "gradient_variance", "gradient_norm_squared")


def trained(rank: int, world_size: int, folder: str, tokens: int, extra: list[str]) -> list[dict[str, Any]]:
    assert run(resolve_words([*TINY, f"output_dir={folder}", f"trainer.tokens={tokens}", *extra], [], world_size)) == 0
    return rows_of(folder)


def resumed(rank: int, world_size: int, folder: str, tokens: int) -> list[dict[str, Any]]:
    """Resume by the command, with overrides on top of the checkpoint's config."""
    assert main([*TINY, f"output_dir={folder}", f"trainer.tokens={tokens}", "resume=auto"]) == 0
    return rows_of(folder)


def rows_of(folder: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ROW if key in row} for row in rows if "loss" in row]


LONG = 16 * 8 * 24


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run one process without interruption."""
    return run_ranks(1, trained, str(tmp_path_factory.mktemp("alone")), LONG, [])[0]


def same(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    assert [row["batch_samples"] for row in rows] == [row["batch_samples"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-9)


def test_the_batch_grows_and_the_rate_with_it(alone: list[dict[str, Any]]) -> None:
    sizes = [row["batch_samples"] for row in alone]
    assert sizes[0] == 8 and sizes[-1] > 16 and sizes == sorted(sizes)
    assert [row["samples"] for row in alone] == [sum(sizes[: n + 1]) for n in range(len(sizes))], "no sample lost or repeated"
    assert alone[-1]["lr"] > alone[4]["lr"]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, ["parallel.zero=1"]),
        (3, ["parallel.zero=2"]),
        (4, ["parallel.zero=2", "parallel.replicate=2"]),
        (2, ["parallel.zero=3", "parallel.cp=2"]),
    ],
)
def test_other_layouts_measure_and_grow_alike(
    alone: list[dict[str, Any]], tmp_path: Path, world_size: int, layout: list[str]
) -> None:
    """No size has to divide by the number of ranks, and `batch.multiple` is not set. The stopped run below is ZeRO-3."""
    assert any(row["batch_samples"] % (2 * world_size) for row in alone)
    same(run_ranks(world_size, trained, str(tmp_path), LONG, layout)[0], alone)


def test_documents_dealt_by_cost_measure_and_grow_alike(tmp_path: Path) -> None:
    """Every third step is measured. A worker's documents then lie in rows of its own, on one rank or shared by both."""
    draw = random.Random(5)
    texts = [json.dumps({"text": "".join(draw.choices("abcdefgh ", k=draw.choice((4, 9, 20, 40))))}) for _ in range(2000)]
    (tmp_path / "a.jsonl").write_text("\n".join(texts))
    words = ["data=jsonl", f"data.input={tmp_path}/a.jsonl", f"data.cache_dir={tmp_path}/cache", "data.tokenizer=bytes"]
    words += ["data.document_mask=true", "data.packing=bestfit", "model.vocabulary=null", "batch.ema=0", "batch.eta=0.2"]
    expected = run_ranks(1, trained, str(tmp_path / "alone"), 16 * 8 * 14, words)[0]
    sizes = [row["batch_samples"] for row in expected]
    assert sizes[-1] > sizes[0] and ["gradient_variance" in row for row in expected][:6] == 2 * [False, False, True]
    hybrid = [*words, "parallel.zero=1", "parallel.hdp=greedy", "parallel.hdp_tokens=20"]
    same(run_ranks(2, trained, str(tmp_path / "hybrid"), 16 * 8 * 14, hybrid)[0], expected)


def test_stopped_and_resumed_on_another_layout(alone: list[dict[str, Any]], tmp_path: Path) -> None:
    first = run_ranks(4, trained, str(tmp_path), LONG // 2, ["parallel.zero=3"])[0]
    assert 8 < first[-1]["batch_samples"] < alone[-1]["batch_samples"], "stopped while growing"
    same(run_ranks(1, resumed, str(tmp_path), LONG)[0], alone)


STAGED = ["batch=stages", "batch.stages='0:8 512:16 2048:32'", "batch.micro=2", "optim.lr_coupling=sqrt"]


def counted(rank: int, world_size: int, folder: str, tokens: int, extra: list[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the rows of a run, and this rank's number of micro-batches in each step."""
    from meshloom.parallel.torch.engine import TorchEngine

    counts: list[int] = []
    accumulate = TorchEngine.accumulate

    def noting(engine: TorchEngine, share: Share, *others: Any) -> Any:
        counts.append(len(share.micro_batches))
        return accumulate(engine, share, *others)

    TorchEngine.accumulate = noting  # the rank is a process of its own
    words = [*PLAIN, *STAGED, f"output_dir={folder}", f"trainer.tokens={tokens}", *extra]
    assert run(resolve_words(words, [], world_size)) == 0
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ROW if key in row} for row in rows if "loss" in row], counts


def test_micro_batches_grow_without_changing_the_run(tmp_path: Path) -> None:
    """Sizes 8, 16, 32 in micro-batches of 2: with micro_max a step keeps the four that the run starts with, and its loss."""
    plain, ones = run_ranks(1, counted, str(tmp_path / "plain"), 16 * 8 * 20, [])[0]
    grown, fewer = run_ranks(1, counted, str(tmp_path / "grown"), 16 * 8 * 20, ["batch.micro_max=4"])[0]
    assert sorted(set(ones)) == [4, 8, 16] and sorted(set(fewer)) == [4, 8], "8 / 2, 16 / 4, 32 / 4"
    same(grown, plain)
    for key, expected in (("zero", [2, 4]), ("pp", [4, 8])):
        layout = ["batch.micro_max=4", f"parallel.{key}={3 if key == 'zero' else 2}"]
        spread, counts = run_ranks(2, counted, str(tmp_path / key), 16 * 8 * 20, layout)[0]
        assert sorted(set(counts)) == expected
        same(spread, plain)


def test_a_measured_batch_with_micro_batches_that_grow(tmp_path: Path) -> None:
    """A measurement stays an estimate of the same thing, so the batch grows nearly as before."""
    rows = run_ranks(1, trained, str(tmp_path), LONG, ["batch.micro_max=8"])[0]
    sizes = [row["batch_samples"] for row in rows]
    assert sizes[-1] > 16 and sizes == sorted(sizes) and all("gradient_variance" in row for row in rows)


def test_a_measured_batch_continues_a_planned_ones_size(tmp_path: Path) -> None:
    run_ranks(1, counted, str(tmp_path), 16 * 32 * 5, [])
    rows = run_ranks(1, resumed, str(tmp_path), 16 * 32 * 9)[0]  # batch.samples=8
    assert [row["batch_samples"] for row in rows][-3:] >= [32] * 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch.micro_max=6"], "3 times batch.micro, which doublings don't reach"),
    ],
)
def test_micro_batches_that_can_not_grow_are_refused(overrides: list[str], message: str) -> None:
    assert message in problems_of(2, *TINY, "trainer.tokens=10000", *overrides)["batch.micro_max"]
