"""Runs in one folder are never taken for each other, and the newest step is the one committed last."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.convert.compose import Source, compose
from meshloom.checkpoint.errors import CheckpointError
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import find_latest, list_steps, step_folders, steps_newest_first
from meshloom.checkpoint.identity import UNNAMED, Parent, RunIdentity
from meshloom.checkpoint.manifest import Manifest
from meshloom.checkpoint.restore import holds_checkpoint, restore
from meshloom.checkpoint.saving.commit import open_target
from meshloom.checkpoint.takeover import take_over
from meshloom.checkpoint.tools import prune
from meshloom.launch.checkpoint import main
from support.checkpoint_runs import open_run, restored_step, save_steps
from support.checkpoint_worlds import fragments, make_arrays
from support.old_formats import rewrite_as

A, B = RunIdentity("a" * 32), RunIdentity("b" * 32, Parent("a" * 32, 20))


def run_of(folder: Path, run: RunIdentity, *steps: int, **config: object) -> None:
    """A run that takes the folder and saves there."""
    checkpointer = open_run(folder, **config)
    checkpointer.begin_run(run)
    save(checkpointer, *steps)
    checkpointer.finish()


def save(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(step, fragments(make_arrays(step), 1, 0)[0], {"step": step}, required=True)


def names(folder: Path) -> list[str]:
    return steps_newest_first(open_files(folder))


def bring_in(folder: Path, step: int = 0, overwrite: bool = False) -> None:
    sources = [Source("w", "weight", torch.float32, (2,), lambda: torch.ones(2))]
    compose(folder, step, sources, {}, overwrite=overwrite)


def head(step: Path) -> Manifest:
    return Manifest.decode((step / "manifest.json").read_bytes(), str(step))


def test_a_checkpoint_carries_its_run_and_the_run_its_parent(tmp_path: Path) -> None:
    run_of(tmp_path, B, 30)
    assert head(tmp_path / "step-00000030").run == B
    report = restore(tmp_path, fragments(make_arrays(), 1, 0, blank=True)[0], Control.alone())
    assert (report.run, report.commit) == (B, 1)
    assert RunIdentity.from_dict(json.loads((tmp_path / "run.json").read_text())) == B
    assert RunIdentity.new().id != RunIdentity.new().id


def test_commits_are_counted_over_starts_and_replacements(tmp_path: Path) -> None:
    run_of(tmp_path, A, 10, 20)
    run_of(tmp_path, A, 10, 30)
    assert {name: head(tmp_path / name).commit for name in names(tmp_path)} == {
        "step-00000030": 4,
        "step-00000010": 3,
        "step-00000020": 2,
    }


def test_newest_step_is_the_last_committed_whatever_clocks_say(tmp_path: Path) -> None:
    run_of(tmp_path, A, 10, 20, 30)
    run_of(tmp_path, A, 15)  # set back
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    (tmp_path / "LATEST").write_text("step-00000030\n")  # as of a copy whose LATEST was copied first
    assert names(tmp_path) == ["step-00000015", "step-00000010", "step-00000030", "step-00000020"]
    assert restored_step(tmp_path) == 15
    run_of(tmp_path, A, 20, keep=2)
    assert names(tmp_path) == ["step-00000020", "step-00000015"]


def test_unreadable_newest_step_is_reported(tmp_path: Path) -> None:
    run_of(tmp_path, A, 10, 20)
    (tmp_path / "step-00000020/manifest.json").write_text("{")
    assert names(tmp_path)[0] == "step-00000020"
    assert restored_step(tmp_path) == 10


def test_another_runs_steps_are_moved_aside_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_of(tmp_path, A, 10, 20)
    open_run(tmp_path).close()
    assert restored_step(tmp_path) == 20  # nobody has taken the folder yet
    checkpointer = open_run(tmp_path)
    checkpointer.begin_run(B)
    checkpointer.close()  # killed before its first save
    assert caplog.text.count("held another run's checkpoints") == 1
    assert not holds_checkpoint(tmp_path) and find_latest(tmp_path) is None
    aside = tmp_path / "replaced-aaaaaaaa"
    assert restored_step(aside) == 20
    assert sorted(path.name for path in aside.iterdir()) == [
        *("LATEST", "run.json", "saves.jsonl", "step-00000010", "step-00000020")
    ]
    run_of(tmp_path, B, 5)
    assert names(tmp_path) == ["step-00000005"]
    run_of(tmp_path, A, 7)
    run_of(tmp_path, B, 8)
    assert {path.name for path in tmp_path.glob("replaced-*")} == {
        "replaced-aaaaaaaa",
        "replaced-bbbbbbbb",
        "replaced-aaaaaaaa-1",
    }


def test_steps_that_could_not_be_moved_do_not_count(tmp_path: Path) -> None:
    run_of(tmp_path, A, 10, 20)
    shutil.copytree(tmp_path, tmp_path / "kept", ignore=shutil.ignore_patterns("kept"))
    run_of(tmp_path, B, 5, 6, 7)
    for path in (tmp_path / "kept").glob("step-*"):
        shutil.copytree(path, tmp_path / path.name)
    assert names(tmp_path) == ["step-00000007", "step-00000006", "step-00000005"]
    assert prune(tmp_path, 1) == ["step-00000006", "step-00000005"]
    assert (tmp_path / "step-00000020").is_dir(), "retention of one run deleted another's"


def test_without_a_word_of_whose_it_is_the_newest_step_tells(tmp_path: Path) -> None:
    run_of(tmp_path / "a", A, 10)
    run_of(tmp_path / "b", B, 5, 6)
    shutil.copytree(tmp_path / "a/step-00000010", tmp_path / "b/step-00000010")
    (tmp_path / "b/run.json").write_text("not JSON")
    assert names(tmp_path / "b") == ["step-00000006", "step-00000005"]


def test_an_import_does_not_count_beside_a_runs_own_steps(tmp_path: Path) -> None:
    bring_in(tmp_path / "imp")
    bring_in(tmp_path / "imp", 3)  # again, and another
    assert names(tmp_path / "imp") == ["step-00000003", "step-00000000"]
    bring_in(tmp_path / "imp", 3, overwrite=True)
    checkpointer = open_run(tmp_path / "imp")
    checkpointer.begin_run(A)
    checkpointer.close()
    assert names(tmp_path / "imp") == ["step-00000003", "step-00000000"], "a run that begins here begins from the import"
    run_of(tmp_path / "imp", A, 2)
    assert names(tmp_path / "imp") == ["step-00000002"]
    with pytest.raises(CheckpointError, match="holds a run's checkpoints"):
        bring_in(tmp_path / "imp", 9)


def test_an_import_replaces_another_only_when_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(folder: Path, coordinator: bool) -> Any:
        monkeypatch.undo()
        bring_in(folder)  # another import, which had the lock first
        return open_target(folder, coordinator)

    monkeypatch.setattr("meshloom.checkpoint.convert.compose.open_target", meanwhile)
    with pytest.raises(CheckpointError, match="has step-00000000 already; give another folder, or --overwrite"):
        bring_in(tmp_path)
    (before,) = tmp_path.glob("step-*")
    inode = before.stat().st_ino
    bring_in(tmp_path, overwrite=True)
    (after,) = tmp_path.glob("step-*")
    assert (after.name, after.stat().st_ino != inode) == ("step-00000000", True)
    assert head(after).commit == 2


def test_an_import_into_the_folder_of_a_run_under_way_is_refused_at_once(tmp_path: Path) -> None:
    running = open_run(tmp_path)
    running.begin_run(A)
    left = tmp_path / "step-00000009.tmp-abc"
    left.mkdir()
    with pytest.raises(CheckpointError, match="holds a run's checkpoints"):
        bring_in(tmp_path)
    running.finish()
    with pytest.raises(CheckpointError, match="holds a run's checkpoints"):
        bring_in(tmp_path)
    assert left.is_dir()


def test_damaged_steps_of_nobody_known_are_put_aside_as_such(tmp_path: Path) -> None:
    run_of(tmp_path, A, 1)
    (tmp_path / "step-00000001/manifest.json").write_text("{")
    take_over(tmp_path, B)
    assert names(tmp_path) == [] and (tmp_path / "replaced-damaged/step-00000001").is_dir()


def test_a_step_that_can_not_be_read_shuts_no_folder_unless_it_may_be_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(tmp_path, A, 1, 2, 3, 4)
    read_bytes, bad = Path.read_bytes, tmp_path / "step-00000001"

    def refuse(path: Path) -> bytes:
        if path == bad / "manifest.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr("meshloom.checkpoint.files.RETRY_PAUSES", ())
    monkeypatch.setattr("meshloom.checkpoint.folder._heads_read", {})  # as a new process
    assert main(["list", str(tmp_path)]) == main(["verify", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.count(f"{bad}  can not be read: ") == said.count(f"UNREADABLE {bad}/manifest.json: ") == 1
    assert said.count("every block is as written") == 3
    assert restored_step(tmp_path) == 4 and "it is older than the newest step" in caplog.text
    run_of(tmp_path, A, 5, keep=2)
    assert names(tmp_path) == ["step-00000005", "step-00000004", bad.name]
    for refused in (lambda: bring_in(tmp_path, 9), lambda: take_over(tmp_path, B)):
        with pytest.raises(CheckpointError, match=r"It may be another run's: .* move that step out of the folder"):
            refused()
    bad = tmp_path / "step-00000005"
    monkeypatch.setattr("meshloom.checkpoint.folder._heads_read", {})
    for refused in (lambda: restored_step(tmp_path), lambda: open_run(tmp_path), lambda: step_folders(tmp_path)):
        with pytest.raises(CheckpointError, match=f"{bad}/manifest.json.* move that step out of the folder"):
            refused()
    (tmp_path / "LATEST").unlink()
    assert names(tmp_path)[0] == bad.name
    assert prune(tmp_path, 1) == ["step-00000001"]
    assert names(tmp_path) == [bad.name, "step-00000004"]


def test_a_run_of_an_older_version_goes_on_in_its_folder(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20, 30)
    for step in (10, 20, 30):
        rewrite_as(tmp_path / f"step-{step:08d}", 2, {"progress": {"step": step}})
    (tmp_path / "LATEST").write_text("step-00000020\n")
    listing = list_steps(open_files(tmp_path))
    assert (listing.run, listing.commit) == (UNNAMED.id, 0)
    assert listing.names == ["step-00000020", "step-00000010", "step-00000030"]  # it was set back
    run_of(tmp_path, UNNAMED, 25)
    assert names(tmp_path) == ["step-00000025", "step-00000020", "step-00000010", "step-00000030"]
    with pytest.raises(CheckpointError, match="holds a run's checkpoints"):
        bring_in(tmp_path)


def test_an_import_of_an_older_version_is_no_run(tmp_path: Path) -> None:
    bring_in(tmp_path)
    rewrite_as(tmp_path / "step-00000000", 2, {"imported_from": {}})
    assert list_steps(open_files(tmp_path)).run is None
    run_of(tmp_path, A, 1)
    assert names(tmp_path) == ["step-00000001"]


def test_a_run_that_is_set_back_has_its_newest_step_there(tmp_path: Path) -> None:
    """Until it saves again: then the numbers of the commits tell."""
    run_of(tmp_path, A, 4, 8, 12, keep=0)
    checkpointer = open_run(tmp_path, keep=0)
    checkpointer.begin_run(A, 1, 4)
    assert names(tmp_path) == ["step-00000004", "step-00000012", "step-00000008"]
    checkpointer.begin_run(A, 1, 4)  # killed and started again
    assert names(tmp_path)[0] == "step-00000004"
    save(checkpointer, 6)
    checkpointer.finish()
    assert names(tmp_path)[0] == "step-00000006"
    assert names(tmp_path)[1] == "step-00000004"
