"""Runs and their folders: a run keeps its identity, a branch notes its parent, and no run goes on with another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import list_steps
from meshloom.checkpoint.restore import holds_checkpoint, read_state
from support.ranks import run_ranks
from support.tiny_run import body

FAIL = "trainer.hooks=[{_target_:support.run_hooks.Fail,step:1}]"


def go(folder: Path, *overrides: str, ranks: int = 1) -> None:
    assert (
        run_ranks(ranks, body, [f"output_dir={folder}", "trainer.eval_every=0", "schedule.warmup=0", *overrides]) == [0] * ranks
    )


def fail(folder: Path, *overrides: str) -> None:
    with pytest.raises(AssertionError, match="a fault of the hook's"):
        go(folder, FAIL, *overrides)


def identity(folder: Path) -> dict[str, Any]:
    found, same = (json.loads((folder / name).read_text()) for name in ("run.json", "checkpoints/run.json"))
    assert all(found[key] == same[key] for key in ("id", "parent"))
    return {key: found[key] for key in ("id", "parent")}


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def test_resumed_run_keeps_its_id_and_a_branch_its_parent(tmp_path: Path) -> None:
    go(tmp_path / "trunk", "trainer.steps=2")
    trunk = identity(tmp_path / "trunk")
    assert trunk["parent"] is None
    go(tmp_path / "trunk", "trainer.steps=3", "resume=auto", ranks=2)
    assert identity(tmp_path / "trunk") == trunk
    go(tmp_path / "branch", "trainer.steps=4", f"resume={tmp_path}/trunk/checkpoints/step-00000002")
    branch = identity(tmp_path / "branch")
    assert branch["id"] != trunk["id"] and branch["parent"] == {"id": trunk["id"], "step": 2}
    go(tmp_path / "trunk", "trainer.steps=4", f"resume={tmp_path}/trunk/checkpoints/step-00000002")  # set back
    assert identity(tmp_path / "trunk") == trunk and steps(tmp_path / "trunk") == [1, 2, 3, 4]


def test_run_killed_before_a_save_does_not_resume_from_another(tmp_path: Path) -> None:
    go(tmp_path, "trainer.steps=3")
    first = identity(tmp_path)
    fail(tmp_path, "trainer.steps=4", "resume=none")
    second = identity(tmp_path)
    assert second["id"] != first["id"] and not holds_checkpoint(tmp_path / "checkpoints")
    go(tmp_path, "trainer.steps=2", "resume=auto")
    assert identity(tmp_path) == second, "it was stopped before its first save, and is the same run"
    assert steps(tmp_path) == [1, 2] and read_state(tmp_path / "checkpoints")["progress"]["step"] == 2
    aside = tmp_path / f"checkpoints/replaced-{first['id'][:8]}"
    assert list_steps(open_files(aside)).names == ["step-00000003"]
    kept = (tmp_path / f"metrics.replaced-{first['id'][:8]}.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in kept if "loss" in row] == [1, 2, 3]


def test_a_run_that_was_moved_aside_can_be_branched_off(tmp_path: Path) -> None:
    go(tmp_path, "trainer.steps=2")
    first = identity(tmp_path)
    go(tmp_path, "trainer.steps=1", "resume=none")
    go(tmp_path, "trainer.steps=4", f"resume={tmp_path}/checkpoints/replaced-{first['id'][:8]}")
    assert identity(tmp_path)["parent"] == {"id": first["id"], "step": 2}
    assert steps(tmp_path) == [3, 4]


def test_a_run_that_is_refused_leaves_the_folder_to_the_other(tmp_path: Path) -> None:
    go(tmp_path, "trainer.steps=2")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(AssertionError, match=r"model\.dim: is 32, and the checkpoint's model has 16"):
        go(tmp_path, "trainer.steps=4", "checkpoint.strict=false", "model.dim=32", "resume=auto")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() ^ before.keys()} <= {".lock", ".run.lock"}
    assert all(after[path] == text for path, text in before.items() if "lock" not in path.name)


def test_another_optimizer_begins_its_state_anew(tmp_path: Path) -> None:
    """AdamW's moments have the names and shapes of LAMB's."""
    go(tmp_path, "trainer.steps=2", "optim.lr=0.01")
    with pytest.raises(AssertionError, match=r"optim: the checkpoint holds the state of AdamW"):
        go(tmp_path, "trainer.steps=3", "resume=auto", "optim=lamb")
    go(tmp_path, "trainer.steps=3", "resume=auto", "optim=lamb", "optim.lr=1e-30", "checkpoint.strict=false")
    state = read_state(tmp_path / "checkpoints")
    assert state["progress"]["step"] == 3 and state["config"]["optim"]["name"] == "lamb"
    assert set(state["counters"].values()) == {1}, "one update of its own"


def test_a_run_set_back_and_killed_before_a_save_stays_there(tmp_path: Path) -> None:
    go(tmp_path, "trainer.steps=6", "checkpoint.every=2")
    fail(tmp_path, "trainer.steps=9", f"resume={tmp_path}/checkpoints/step-00000002", FAIL.replace("step:1", "step:3"))
    go(tmp_path, "trainer.steps=4", "resume=auto")
    assert steps(tmp_path)[-2:] == [3, 4] and list_steps(open_files(tmp_path / "checkpoints")).names[0] == "step-00000004"
    go(tmp_path, "trainer.steps=5", "resume=auto")
    assert steps(tmp_path)[-1] == 5
