"""Whole runs of several islands: resumed in the middle of a round, without islands, and stopped by a signal to one island."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.reading.compare import read_array
from meshloom.checkpoint.restore import read_state
from meshloom.launch.evaluate import read_arguments, resolve_evaluation
from meshloom.trainer.evaluate import evaluate
from meshloom.trainer.guard.island_statistics import STATISTICS
from support.ranks import run_ranks
from support.tiny_run import body

ROUNDS = ["optim.local.islands=2", "optim.local.inner_steps=4", "trainer.eval_every=3", "trainer.steps=10"]
LATE = ["optim.local.fragments=2", "optim.local.delay=3", "optim.local.mix=0.5", "parallel.zero=1"]


def go(ranks: int, folder: Path, *words: str) -> None:
    assert run_ranks(ranks, body, [f"output_dir={folder}", *words]) == [0] * ranks


def rows(folder: Path, key: str) -> dict[int, Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def checkpoints(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "checkpoint_step" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two islands of one rank. At step 7 differences of a fragment are under way, and used two steps later."""
    folder = tmp_path_factory.mktemp("whole")
    go(2, folder, *ROUNDS, *LATE, "checkpoint.every=7")
    return folder


def test_a_run_goes_on_from_the_middle_of_a_round_on_another_layout(tmp_path: Path, whole: Path) -> None:
    """The islands' own weights and optimizer state are restored, and what was under way is sent again."""
    go(4, tmp_path, *ROUNDS, *LATE, "parallel.zero=3", f"resume={whole}/checkpoints/step-00000007")
    for key in ("loss", "eval_loss"):
        resumed = rows(tmp_path, key)
        assert min(resumed) > 7 and resumed == pytest.approx({step: rows(whole, key)[step] for step in resumed}, rel=1e-9)


def evaluated(rank: int, world_size: int, step: str) -> float | None:
    words = [f"checkpoint={step}", f"launch.nproc={world_size}", "parallel.zero=1"]
    return evaluate(resolve_evaluation(read_arguments(words))).loss


def test_a_checkpoint_is_evaluated_by_itself_as_its_run_was(tmp_path: Path, whole: Path) -> None:
    """It needs no islands: the outer weights are its weights."""
    step = f"{whole}/checkpoints/step-00000010"
    assert run_ranks(1, evaluated, step) == [pytest.approx(rows(whole, "eval_loss")[10], rel=1e-9)]


def test_runs_go_on_with_fewer_islands_and_more(tmp_path: Path, whole: Path) -> None:
    """The outer weights go on, by the explicit wish that state without a place is left out."""
    loose = ["checkpoint.strict=false", "trainer.eval_every=0"]
    alone = ["optim.local.islands=1", "trainer.steps=8", f"resume={whole}/checkpoints/step-00000007"]
    go(1, tmp_path / "alone", *loose, *alone)
    assert list(rows(tmp_path / "alone", "loss")) == [8]
    again = [*ROUNDS, f"resume={tmp_path}/alone/checkpoints/step-00000008"]
    go(2, tmp_path / "again", *loose, *again)
    assert list(rows(tmp_path / "again", "loss")) == [9, 10]


def test_a_run_with_a_quorum_goes_on_when_islands_go_and_come(tmp_path: Path, whole: Path) -> None:
    """Under `checkpoint.strict`, and its checkpoints and metrics say who took part.

    Where the newest step is damaged, the one before is read with the islands that it has.
    """
    words = [*ROUNDS, *LATE, "optim.local.quorum=1"]
    shutil.copytree(whole, tmp_path / "one")
    shutil.rmtree(tmp_path / "one/checkpoints/step-00000010")
    (tmp_path / "one/metrics.jsonl").unlink()
    go(1, tmp_path / "one", *words, "trainer.steps=8", "resume=auto")
    go(2, tmp_path / "two", *words, f"resume={tmp_path}/one/checkpoints/step-00000008")
    present = rows(tmp_path / "one", "islands/present") | rows(tmp_path / "two", "islands/present")
    assert present == {8: 1, 9: 2, 10: 2}
    state = read_state(tmp_path / "two/checkpoints/step-00000010")
    assert state["hooks"]["IslandHistory"] == {"since": [[1, 2], [8, 1], [9, 2]]} and state["islands"] == 2
    step = f"{tmp_path}/one/checkpoints/step-00000008"
    assert run_ranks(1, evaluated, step) == [pytest.approx(rows(tmp_path / "one", "eval_loss")[8], rel=1e-9)]
    for file in Path(step).glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    go(2, tmp_path / "one", *words, "resume=auto")
    for key in ("loss", "eval_loss"):
        assert rows(tmp_path / "one", key)[10] == pytest.approx(rows(whole, key)[10], rel=1e-9)


def test_a_signal_to_one_island_stops_all_where_they_meet(tmp_path: Path) -> None:
    """Under CO2 that is where the first round arrives and the second leaves, which the only checkpoint must know of."""
    words = ["optim.local={islands:2,inner_steps:2,delay:2,lr:1,momentum:0.2,nesterov:false}", "trainer.steps=7"]
    words += ["checkpoint.every=null", "trainer.eval_every=7"]
    hook = "trainer.hooks=[{_target_:support.run_hooks.Signal,step:1,rank:1,name:SIGTERM}]"
    go(2, tmp_path / "whole", *words)
    go(2, tmp_path / "stopped", *words, hook)
    assert list(rows(tmp_path / "stopped", "loss")) == [1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "stopped/checkpoints").glob("step-*")] == ["step-00000004"]
    go(2, tmp_path / "stopped", "resume=auto", "trainer.hooks=[]")
    for key in ("loss", "eval_loss"):
        assert rows(tmp_path / "stopped", key) == pytest.approx(rows(tmp_path / "whole", key), rel=1e-9)


SPOIL = "trainer.hooks=[{_target_:support.run_hooks.Jolt,first:%d,last:%d,factor:null,island:1}]"


def test_an_island_that_skips_a_step_adds_nothing_to_the_mean(tmp_path: Path) -> None:
    """So the outer weights are those of the other island alone."""
    words = ["trainer.eval_every=1", "checkpoint.every=0", "trainer.steps=2"]
    local = "optim.local={islands:2,inner_steps:1,lr:1,momentum:0,nesterov:false}"
    go(2, tmp_path / "islands", *words, local, SPOIL % (1, 1), "trainer.on_bad_step=skip")
    go(1, tmp_path / "alone", *words, "batch.samples=4")
    evaluated, joint = (rows(tmp_path / "islands", key) for key in ("eval_loss", "islands/loss"))
    assert joint == {2: pytest.approx(rows(tmp_path / "alone", "loss")[1], rel=1e-9)}
    assert evaluated[1] == pytest.approx(rows(tmp_path / "alone", "eval_loss")[1], rel=1e-9)
    parameters = 61 * 16 + 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16 + 2 * 16) + 16
    assert rows(tmp_path / "islands", "islands/bytes") == {2: 8 * parameters}


def test_a_step_that_one_island_takes_again_is_saved_once(tmp_path: Path) -> None:
    """Or the island's next save would be of another step than those of the others."""
    words = ["optim.local.islands=2", "optim.local.inner_steps=4", "trainer.steps=4", "trainer.eval_every=0"]
    words += ["trainer.on_bad_step=skip", "checkpoint.mode=async", "checkpoint.every=2"]
    go(2, tmp_path, *words, SPOIL % (2, 2))
    assert [line["checkpoint_saved"] for line in checkpoints(tmp_path)] == [True] * 2


def guarded(step: Path) -> list[list[float]]:
    """Return the losses that each island's guard has accepted, of a checkpoint; nothing of one that was absent."""
    files = open_files(step)
    array = read_array(files, load_manifest(files), f"run/{STATISTICS}")
    return [row[7:][: int(row[1])] if row[0] == 1 else [] for row in array.tolist()]


def test_the_guard_of_each_island_goes_on_with_its_own_statistic(tmp_path: Path) -> None:
    """One that comes begins it anew. The losses of the second follow from those of the first, and of both."""
    words = ["optim.local={islands:2,inner_steps:1,quorum:1}", "trainer.eval_every=0"]
    go(2, tmp_path / "two", *words, "trainer.steps=4")
    go(2, tmp_path / "two", *words, "trainer.steps=6", "resume=auto")
    first, joint = (rows(tmp_path / "two", key) for key in ("loss", "islands/loss"))
    second = [2 * joint[step + 1] - first[step] for step in range(1, 6) if step + 1 in joint]
    found = guarded(tmp_path / "two/checkpoints/step-00000006")
    assert found[0] == pytest.approx(list(first.values()), rel=1e-12) and len(found[1]) == 6
    known = [step for step in range(1, 6) if step + 1 in joint]
    assert [found[1][step - 1] for step in known] == pytest.approx(second, rel=1e-9) and len(known) >= 4
    step = f"{tmp_path}/two/checkpoints/step-00000006"
    go(1, tmp_path / "one", *words, "trainer.steps=7", f"resume={step}")
    assert [len(each) for each in guarded(tmp_path / "one/checkpoints/step-00000007")] == [7, 0]
    go(2, tmp_path / "again", *words, "trainer.steps=8", f"resume={tmp_path}/one/checkpoints/step-00000007")
    assert [len(each) for each in guarded(tmp_path / "again/checkpoints/step-00000008")] == [8, 1]
