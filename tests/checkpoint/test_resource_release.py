"""Saves, failed ones too, keep no memory, processes or keepers of others; and what must not stop them."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshloom.checkpoint import faults, restore
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import CheckpointError
from meshloom.checkpoint.folder import KEEPERS
from meshloom.checkpoint.manifest import Manifest
from meshloom.checkpoint.memory import tier
from meshloom.checkpoint.memory.keeper import Keeper, registered
from meshloom.checkpoint.memory.tier import Predecessors
from meshloom.checkpoint.memory.wire import Address, Connection
from meshloom.checkpoint.saving.commit import LocalTarget
from meshloom.checkpoint.saving.snapshot import Snapshot
from meshloom.checkpoint.saving.staging import StagingBuffer
from meshloom.checkpoint.stored_file import StoredFile
from support.checkpoint_runs import open_run, restored_step, save_steps
from support.checkpoint_worlds import fragments, make_arrays
from support.mapped_memory import staging_buffers_mapped

pytestmark = [pytest.mark.started_writers, pytest.mark.usefixtures("nothing_left")]


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("what", ["snapshot.before", "report.before", "prune", "damage", "writer"])
def test_failed_saves_leave_no_memory_to_the_garbage_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fail(boundary: str, amount: int) -> int:
        if boundary == what:
            raise OSError("injected")
        return amount

    def busy(path: Path) -> None:
        raise OSError("somebody reads it")

    before = staging_buffers_mapped(os.getpid())
    if what == "writer":
        monkeypatch.setenv(faults.VARIABLE, "enospc:hash.before")
    for mode in ("async", "sync"):
        run = open_run(tmp_path / mode, mode=mode, keep=1, failures=99)
        faults.install(fail)
        if what == "prune":
            monkeypatch.setattr(shutil, "rmtree", busy)
        for step in (1, 2, 3):
            run.save(step, fragments(make_arrays(step), 1, 0)[0], {}, required=True)
            run.before_update()
            run.wait()
            if what == "damage":
                (tmp_path / mode / f"step-{step:08d}/rank-00000.safetensors").write_bytes(b"short")
        with contextlib.suppress(CheckpointError):
            run.finish()
        faults.install(None)
        assert staging_buffers_mapped(os.getpid()) == before


@pytest.mark.usefixtures("no_collection")
def test_a_restore_from_keepers_that_have_gone_leaves_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def have_gone(*_: object) -> None:
        raise CheckpointError("its keepers have gone")

    save_steps(tmp_path, 1)
    monkeypatch.setattr(restore, "find_recovery", lambda folder: SimpleNamespace(encode=lambda: "{}"))
    monkeypatch.setattr(restore, "manifest_of", lambda version: SimpleNamespace(run=None, commit=9, step=9))
    monkeypatch.setattr(restore, "open_recovery", have_gone)
    target = fragments(make_arrays(), 1, 0, blank=True)[0]
    held = weakref.ref(target[0].tensor)
    with contextlib.suppress(CheckpointError):
        restore.restore(tmp_path, target, Control.alone())
        raise AssertionError
    del target
    assert held() is None


def test_an_arena_that_is_closed_is_gone_whoever_still_knows_it() -> None:
    before = staging_buffers_mapped(os.getpid())
    buffer = StagingBuffer(2**20, pin=False)
    assert staging_buffers_mapped(os.getpid()) == before + 1
    buffer.close()
    assert staging_buffers_mapped(os.getpid()) == before


def test_memory_that_is_not_to_be_had_is_not_half_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(buffer: StagingBuffer) -> None:
        raise CheckpointError("no memory")

    before = staging_buffers_mapped(os.getpid())
    monkeypatch.setattr(StagingBuffer, "_populate", refuse)
    with pytest.raises(CheckpointError) as caught:
        StagingBuffer(2**20, pin=False)
    assert caught.tb is not None and staging_buffers_mapped(os.getpid()) == before


@contextlib.contextmanager
def a_child() -> Iterator[None]:
    """A process forked from this one, with copies of all its descriptors, such as a data loader's worker."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_end_does_not_wait_for_children_of_the_trainer(tmp_path: Path) -> None:
    run = open_run(tmp_path, memory_every=1)
    run.save(1, fragments(make_arrays(1), 1, 0)[0], {})
    with a_child():
        ending = threading.Thread(target=run.finish, daemon=True)
        ending.start()
        ending.join(30)
        assert not ending.is_alive()
    assert not registered(tmp_path)


def test_empty_keeper_ends_with_the_run_and_spares_its_children(tmp_path: Path) -> None:
    run = open_run(tmp_path, memory_every=1, host_memory_gib=3.0 / 1024)
    run.save(1, fragments(make_arrays(1), 1, 0)[0], {})
    assert run._context.memory is not None and run._context.memory._keeper is not None
    process = run._context.memory._keeper._process
    with a_child():
        run.close()
        process.wait(30)


def test_a_trainer_with_thousands_of_open_files_saves(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("this system allows too few open files")
    opened: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
        while not opened or opened[-1] < 1100:
            opened.append(os.open(os.devnull, os.O_RDONLY))
        save_steps(tmp_path, 1, 2, memory_every=1)
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert restored_step(tmp_path) == 2


def test_stranger_on_a_dead_keepers_port_does_not_stop_a_restore(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for answer in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"[1]\n"):
                link, _ = server.accept()
                with link:
                    link.recv(65536)
                    link.sendall(answer)

        stranger = threading.Thread(target=serve, daemon=True)
        stranger.start()
        (tmp_path / KEEPERS).mkdir()
        entry = Address("127.0.0.1", server.getsockname()[1], "secret", 0).as_dict()
        (tmp_path / KEEPERS / "00000-0123.json").write_text(json.dumps(entry))
        assert restored_step(tmp_path) == 1
        with pytest.raises(CheckpointError, match="nobody who speaks to keepers"):
            Connection(Address(**entry), 30.0).ask({"do": "status"})
        stranger.join(30)


def test_only_keepers_that_were_found_before_are_dismissed(tmp_path: Path) -> None:
    old, own = (Keeper(tmp_path, slot, 30.0) for slot in (0, 1))
    predecessors = Predecessors(tmp_path)
    predecessors.dismiss()
    assert len(registered(tmp_path)) == 2
    predecessors.find({own.address})
    late = Keeper(tmp_path, 2, 30.0)
    predecessors.find(set())
    predecessors.dismiss()
    assert set(registered(tmp_path).values()) == {own.address, late.address}
    for keeper in (old, own, late):
        keeper.exit()
    assert not registered(tmp_path)


def test_step_that_can_not_be_hidden_does_not_block_deletions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1, 2, 3)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "step-00000001":
            raise OSError("somebody holds it")
        return rename(self, target)

    target = LocalTarget(tmp_path, coordinator=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(OSError, match="somebody holds it"):
            target.prune(1)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000003"]
    assert target.prune(1) == ["step-00000001"]
    target.close()


def test_uncleared_folder_is_not_reported_as_another_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(path: Path) -> Iterator[Path]:
        raise PermissionError("not yours")

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(Path, "iterdir", blind)
        LocalTarget(tmp_path, coordinator=True)
    LocalTarget(tmp_path, coordinator=True).close()


def test_replaced_step_goes_even_if_latest_can_not_be_written(tmp_path: Path) -> None:
    def full(boundary: str, amount: int) -> int:
        if boundary == "latest.write.before":
            raise OSError("the disk is full")
        return amount

    save_steps(tmp_path, 1)
    run = open_run(tmp_path, keep=5)
    for hook in (full, None):
        faults.install(hook)
        run.save(1, fragments(make_arrays(1), 1, 0)[0], {})
    assert [report.outcome for report in run.poll()] == ["failed", "committed"]
    run.close()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]


def test_a_snapshot_waits_longer_than_any_one_stage_before_it() -> None:
    snapshot = Snapshot([])
    with pytest.raises(CheckpointError, match=r"0\.04 s \(4 times checkpoint\.timeout\)"):
        snapshot.wait(0.01)


def test_shard_that_can_not_be_rebuilt_leaves_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(*_: object) -> None:
        raise CheckpointError("node a does not answer")

    file = StoredFile("rank-00001.safetensors", 1000, "rank-00001.leaves", "", 1)
    monkeypatch.setattr(tier, "Connection", out_of_reach)
    monkeypatch.setattr(tier, "_manifest_of", lambda _: Manifest(1, 2, {}, [file], {}).encode())
    recovery: Any = SimpleNamespace(holders={0: (None, 1000)}, version="a", step=1)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(CheckpointError, match="does not answer"):
        tier._make_again(recovery, 1, {"members": [0, 1], "block": 4096}, tmp_path, 1.0)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
