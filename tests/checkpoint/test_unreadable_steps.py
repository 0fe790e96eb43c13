"""Steps whose manifests can't be read now: none goes on from an older one for that, unless a newer one is whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import FileStore

from meshloom.checkpoint import files as files_module
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import CheckpointError, UnreadableError
from meshloom.checkpoint.files import LocalFiles, open_files
from meshloom.checkpoint.folder import find_latest, list_steps
from meshloom.checkpoint.identity import RunIdentity
from meshloom.checkpoint.restore import holds_checkpoint, read_manifest, restore
from meshloom.checkpoint.saving.commit import steps_to_prune
from meshloom.launch.checkpoint import main
from support.checkpoint_runs import open_run, restored_step
from support.checkpoint_worlds import fragments, make_arrays
from support.ranks import run_ranks

RUN = RunIdentity("a" * 32)


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function: the manifests of these steps alone can't be read from now on, as in a new process."""
    bad: set[Path] = set()
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "manifest.json" and path.parent in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(path)

    def begin(*steps: Path) -> None:
        bad.clear()
        bad.update(steps)
        monkeypatch.setattr("meshloom.checkpoint.folder._heads_read", {})

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr("meshloom.checkpoint.files.RETRY_PAUSES", ())
    return begin


def save(folder: Path, *steps: int, after: int = 0, back: int | None = None) -> None:
    run = open_run(folder)
    try:
        run.begin_run(RUN, after, back)
        for step in steps:
            run.save(step, fragments(make_arrays(step), 1, 0)[0], {"step": step}, required=True)
    finally:
        run.finish()


@pytest.mark.parametrize("damage", ["manifest", "digest", "length"])
def test_a_damaged_step_makes_an_unreadable_one_no_older(tmp_path: Path, fail: Callable[..., None], damage: str) -> None:
    save(tmp_path, 1, 2, 3)
    newest, unreadable = tmp_path / "step-00000003", tmp_path / "step-00000002"
    data = newest / "rank-00000.safetensors"
    if damage == "manifest":
        (newest / "manifest.json").write_text("{")
    elif damage == "digest":
        data.write_bytes(data.read_bytes()[:-5] + b"wrong")
    else:
        os.truncate(data, 100)
    fail(unreadable)
    with pytest.raises(CheckpointError, match=f"{unreadable}/manifest.json: reading it failed"):
        restored_step(tmp_path)
    if damage != "digest":
        with pytest.raises(UnreadableError):
            find_latest(tmp_path)
    if damage == "manifest":  # neither's number is known, so the next could be one of theirs
        with pytest.raises(UnreadableError):
            save(tmp_path, 4, after=1, back=1)
    fail()
    assert restored_step(tmp_path) == 2
    listing = list_steps(open_files(tmp_path))
    assert listing.names == [newest.name, unreadable.name, "step-00000001"]


def test_any_unreadable_step_may_be_the_newest_where_that_is_not_known(tmp_path: Path, fail: Callable[..., None]) -> None:
    """The run was set back to a step that is gone; what it saved after it has a lower number than what it had before."""
    save(tmp_path, 10, 20, 30)
    save(tmp_path, 15, after=1, back=10)
    shutil.rmtree(tmp_path / "step-00000010")
    (tmp_path / "LATEST").unlink()
    fail(tmp_path / "step-00000015")
    assert list_steps(open_files(tmp_path)).names[0] == "step-00000015"


def test_a_snapshot_in_memory_counts_for_no_newer_than_an_unreadable_step(
    tmp_path: Path, fail: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, 2)
    snapshot = SimpleNamespace(run=RUN, commit=9, step=9)
    monkeypatch.setattr("meshloom.checkpoint.restore.find_recovery", lambda folder: SimpleNamespace(encode=lambda: "{}"))
    monkeypatch.setattr("meshloom.checkpoint.restore.manifest_of", lambda version: snapshot)
    assert read_manifest(tmp_path) is snapshot
    fail(tmp_path / "step-00000002")
    assert holds_checkpoint(tmp_path)
    with pytest.raises(UnreadableError) as caught:
        read_manifest(tmp_path)
    assert "start again" not in str(caught.value), "whoever asks gives the advice, and once"


def test_a_listing_waits_for_the_first_unreadable_step_alone(
    tmp_path: Path, fail: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    save(tmp_path, 1, 2, 3, 4)
    slept: list[float] = []
    monkeypatch.setattr(files_module, "RETRY_PAUSES", (1.0, 2.0))
    monkeypatch.setattr(files_module, "time", SimpleNamespace(sleep=slept.append))
    with monkeypatch.context() as patch:
        patch.setattr(LocalFiles, "_size", cut_off)
        fail(*tmp_path.glob("step-*"))
        for tries in (1, 2):
            assert len(list_steps(open_files(tmp_path)).unreadable) == 4
            assert slept == [1.0, 2.0] * tries, "each listing tries again"
    slept.clear()
    fail(tmp_path / "step-00000001")
    monkeypatch.setattr(LocalFiles, "_sizes", cut_off)
    assert steps_to_prune(LocalFiles(tmp_path), 1) == []
    assert slept == [1.0, 2.0]


def test_verify_goes_on_where_a_step_can_not_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1, 2)
    bad, scandir = tmp_path / "step-00000002", os.scandir

    def refuse(path: Any) -> Any:
        if path == bad:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert main(["verify", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"UNREADABLE {bad}: asking for the lengths of its files failed: " in said
    assert said.count("every block is as written") == 1


def _restored_without_store(rank: int, world: int, folder: Path, store: Path, when: str, grouped: bool) -> str:
    """Restore where a rank's store goes away. Returns the error."""
    files_module.RETRY_PAUSES = ()

    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def go_away(*_: Any) -> Any:
        files_module.LocalFiles._size = files_module.LocalFiles._read = fail
        fail()

    if rank == 1:
        if when == "at the start":
            files_module.LocalFiles._size = fail
        else:
            os.preadv = go_away
    target = fragments(make_arrays(), 1, 0, blank=True)[0]
    try:
        group = dist.group.WORLD if grouped else None
        restore(folder, target, Control(rank, world, FileStore(str(store), world)), timeout=10.0, group=group)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("when", ["at the start", "while it reads"])
def test_a_rank_whose_store_is_away_tells_the_others(tmp_path: Path, when: str, grouped: bool) -> None:
    save(tmp_path / "run", 1, 2)
    for said in run_ranks(2, _restored_without_store, tmp_path / "run", tmp_path / "store", when, grouped):
        assert "step-00000002/rank-00000." in said and "Input/output error" in said
        assert said.endswith("start again once it can be read, or move that step out of the folder")
