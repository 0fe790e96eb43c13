"""Two runs on one folder of an object store: the second is refused, and one that was cut off can't commit any more."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest

from meshloom.checkpoint import lease
from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import CheckpointError, HeldError, UnreadableError
from meshloom.checkpoint.fence import FENCE, Fence
from meshloom.checkpoint.files import RemoteFiles, open_files
from meshloom.checkpoint.folder import find_latest, list_steps
from meshloom.checkpoint.lease import Lease
from meshloom.checkpoint.saving.commit import RemoteTarget, open_target
from meshloom.checkpoint.tools import prune
from support.checkpoint_worlds import fragments, make_arrays

NEVER = 1e9  # seconds
ELSEWHERE = {"holder": "other process 7", "place": "another machine", "process": 7, "token": "theirs", "beat": 0}


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteFiles]:
    """A folder of a store in memory; a run that is watched is watched until it has moved or is known to be gone."""
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(lease, "LEASE_SECONDS", NEVER)
    found = open_files(f"memory://{uuid4().hex}")
    assert isinstance(found, RemoteFiles)
    yield found
    found.delete("")


def record(files: RemoteFiles) -> dict[str, Any]:
    return json.loads(files.read(".lock"))


def leave(files: RemoteFiles, **values: Any) -> None:
    """The record of another run."""
    files.write(".lock", json.dumps({**ELSEWHERE, **values}).encode())


@contextlib.contextmanager
def renewed(files: RemoteFiles, **values: Any) -> Iterator[None]:
    """The record of another run that is still there."""
    over = threading.Event()

    def renew() -> None:
        beat = 0
        while not over.wait(0.02):
            beat += 1
            leave(files, **values, beat=beat)

    leave(files, **values)
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_the_second_run_is_refused_until_the_first_has_ended(files: RemoteFiles) -> None:
    first = Lease(files)
    with pytest.raises(HeldError, match=rf"another run is saving into this folder \(.* process {os.getpid()}\); stop it"):
        Lease(files)
    first.check()
    first.release()
    first.release()
    assert files.names() == []
    Lease(files).release()


def test_a_run_elsewhere_that_renews_its_record_is_there(files: RemoteFiles) -> None:
    with renewed(files), pytest.raises(HeldError, match="other process 7"):
        Lease(files)
    assert record(files)["token"] == "theirs"


@pytest.mark.parametrize("text", [json.dumps(ELSEWHERE), "{", "[]"])
def test_a_record_that_nobody_renews_is_of_a_run_that_is_gone(
    files: RemoteFiles, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.05)
    files.write(".lock", text.encode())
    held = Lease(files)
    held.check()
    held.release()


def test_a_run_that_ends_while_it_is_watched_leaves_the_folder(files: RemoteFiles) -> None:
    leave(files)
    ending = threading.Timer(0.1, lambda: files.delete(".lock"))
    ending.start()
    Lease(files).release()
    ending.join()


def test_dead_process_of_this_machine_is_not_waited_for(files: RemoteFiles) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process in (ended.pid, os.getpid()):  # a container's first process has the same number each time
        leave(files, place=lease._place(), process=process)
        Lease(files).release()
    with renewed(files, place=lease._place(), process=os.getppid()), pytest.raises(HeldError):
        Lease(files)


def test_of_two_that_come_at_once_one_is_refused(files: RemoteFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen an empty folder; where the store knows no conditions, the later record stands."""
    write = RemoteFiles.write

    def overtaken(self: RemoteFiles, name: str, data: bytes, *, anew: bool = False) -> bool:
        written = write(self, name, data, anew=anew)
        write(self, ".lock", json.dumps(ELSEWHERE).encode())
        return written

    monkeypatch.setattr(RemoteFiles, "write", overtaken)
    with pytest.raises(HeldError, match="other process 7"):
        Lease(files)


def test_holder_renews_its_record_until_another_takes_it(files: RemoteFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.001)
    held = Lease(files)
    deadline = time.monotonic() + 60
    while record(files)["beat"] < 3:
        assert time.monotonic() < deadline
    leave(files)
    held._thread.join(60)
    assert not held._thread.is_alive() and record(files) == ELSEWHERE
    held.release()
    assert record(files) == ELSEWHERE


@pytest.mark.parametrize("found_by", ["a look", "renewal"])
def test_a_start_that_is_late_gives_the_folder_back(files: RemoteFiles, monkeypatch: pytest.MonkeyPatch, found_by: str) -> None:
    """An earlier start of the launch hung in its write, which came after a later one had taken the folder."""
    monkeypatch.setenv(FENCE, str(Fence("launch-1", 2, 4)))
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.001 if found_by == "renewal" else NEVER)
    held = Lease(files)
    leave(files, holder="other process 7 (start 1.3 of launch-1)")
    if found_by == "a look":
        held.check()
    deadline = time.monotonic() + 60
    while record(files)["token"] != held._token:
        assert time.monotonic() < deadline
    taken_back = record(files)
    leave(files, holder="other process 7 (start 3.5 of launch-1)")
    with pytest.raises(HeldError, match=r"start 3\.5 of launch-1"):
        held.check()
    files.write(".lock", json.dumps(taken_back).encode())
    held.release()
    assert record(files)["over"], "the earlier start is there, and may come again"


START = """
import sys
from meshloom.checkpoint import lease
from meshloom.checkpoint.files import open_files

lease.WATCH_SECONDS = lease.LEASE_SECONDS = 0.01
held = lease.Lease(open_files(sys.argv[1]))
if sys.argv[2] == "released":
    held.release()
"""


@pytest.mark.parametrize("second", ["released", "crashed"])
def test_a_start_that_thaws_when_later_ones_are_over_gets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    """Of three starts the first freezes on another machine; the second and the third, on one machine, are over then."""
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.01)
    url = f"local://{tmp_path}/run"
    files = open_files(url)
    assert isinstance(files, RemoteFiles)
    with monkeypatch.context() as first:
        first.setenv(FENCE, str(Fence("launch-1", 1, 3)))
        first.setattr(lease, "RENEWAL_SECONDS", NEVER)
        first.setattr(lease, "_place", lambda: "another machine")
        frozen = Lease(files)
    monkeypatch.setenv(FENCE, str(Fence("launch-1", 2, 4)))
    subprocess.run([sys.executable, "-c", START, url, second], check=True, timeout=100)
    monkeypatch.setenv(FENCE, str(Fence("launch-1", 2, 5)))
    Lease(files).release()
    monkeypatch.setenv(FENCE, str(Fence("launch-1", 1, 3)))
    with pytest.raises(HeldError, match=r"start 2\.5 of launch-1\) has taken this folder over"):
        frozen.check()
    with pytest.raises(HeldError, match=r"start 2\.5 of launch-1\) has taken this folder over"):
        Lease(files)  # that had frozen before it took the folder
    with monkeypatch.context() as soon:
        soon.setattr(lease, "RENEWAL_SECONDS", 0.001)
        frozen._renew()  # ends, as the folder is another's
    frozen.release()
    assert record(files)["over"], "and stays for those who thaw later"
    monkeypatch.delenv(FENCE)
    held = Lease(files)  # of a run of its own, which need not wait
    held.check()
    held.release()


def test_a_run_that_overtook_another_and_ends_while_it_is_watched(files: RemoteFiles) -> None:
    leave(files)
    ending = threading.Timer(0.1, lambda: leave(files, over=True))
    ending.start()
    Lease(files).release()
    ending.join()
    assert record(files)["over"], "who was overtaken may come back"


def test_a_late_write_does_not_refuse_a_later_start(files: RemoteFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FENCE, str(Fence("launch-1", 2, 4)))
    write = RemoteFiles.write

    def overtaken(self: RemoteFiles, name: str, data: bytes, *, anew: bool = False) -> bool:
        written = write(self, name, data, anew=anew)
        if anew:
            leave(self, holder="other process 7 (start 1.3 of launch-1)")
        return written

    def leave(files: RemoteFiles, holder: str) -> None:
        write(files, ".lock", json.dumps({**ELSEWHERE, "holder": holder}).encode())

    monkeypatch.setattr(RemoteFiles, "write", overtaken)
    held = Lease(files)
    assert record(files)["token"] == held._token
    held.release()


def overwrite(files: RemoteFiles, frozen: Lease) -> None:
    """Let a run write that froze after it had found its own record."""
    with pytest.MonkeyPatch.context() as thawed:
        thawed.setattr(frozen, "_over", threading.Event())
        own = {".lock": {"token": frozen._token}}
        thawed.setattr(
            frozen, "_read", lambda name=".lock": thawed.setattr(lease, "RENEWAL_SECONDS", NEVER) or own.get(name, {})
        )
        thawed.setattr(lease, "RENEWAL_SECONDS", 0.001)
        thread = threading.Thread(target=frozen._renew)
        thread.start()
        deadline = time.monotonic() + 60
        while record(files)["token"] != frozen._token:
            assert time.monotonic() < deadline
        frozen._over.set()
        thread.join()


def freeze(files: RemoteFiles, monkeypatch: pytest.MonkeyPatch) -> Lease:
    """Return the lease of a run on another machine that is silent from now on."""
    with monkeypatch.context() as first:
        first.setattr(lease, "_place", lambda: "another machine")
        frozen = Lease(files)
    monkeypatch.setattr(lease, "_held", set())
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.01)
    return frozen


@pytest.mark.parametrize("ended", [False, True], ids=["goes on", "is over"])
def test_a_run_frozen_before_its_write_gets_nothing(files: RemoteFiles, monkeypatch: pytest.MonkeyPatch, ended: bool) -> None:
    """It overwrites the record of the run that has taken the folder, where the store can't refuse that."""
    frozen = freeze(files, monkeypatch)
    held = Lease(files)
    held.check()
    if ended:
        held.release()
    overwrite(files, frozen)
    with pytest.raises(HeldError, match="has taken this folder over from this run"):
        frozen.check()
    if not ended:
        held.check()
        assert record(files)["token"] == held._token, "it has the folder still"
        held.release()


def test_a_frozen_run_takes_nothing_from_one_that_came_later_still(files: RemoteFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that took the folder from it is over when it thaws, and another has the folder."""
    frozen = freeze(files, monkeypatch)
    Lease(files).release()
    held = Lease(files)
    overwrite(files, frozen)
    with pytest.raises(HeldError, match="has taken this folder over from this run"):
        frozen.check()
    held.check()
    assert record(files)["token"] == held._token
    with pytest.raises(HeldError, match="has taken this folder over from this run"):
        frozen.check()
    held.release()


def test_a_frozen_run_neither_renews_nor_releases_what_it_lost(files: RemoteFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = freeze(files, monkeypatch)
    held = Lease(files)
    overwrite(files, frozen)
    before = record(files)
    with monkeypatch.context() as soon:
        soon.setattr(lease, "RENEWAL_SECONDS", 0.001)
        frozen._renew()  # ends, as the folder is another's
    frozen.release()
    assert record(files) == before, "the other puts its own record back"
    held.check()
    held.release()
    assert record(files)["over"]


def test_marks_for_runs_that_never_come_back_are_deleted(files: RemoteFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    freeze(files, monkeypatch)
    Lease(files).release()
    Lease(files).release()
    assert len(files.names()) == 2, "the mark is young"
    now = time.time() + lease.MARK_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: now)
    Lease(files).release()
    assert files.names() == [".lock"]


@pytest.mark.parametrize("ended", [False, True], ids=["goes on", "is over"])
def test_a_run_that_froze_while_it_took_the_folder_gets_nothing(
    files: RemoteFiles, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """Another takes the folder from the same run meanwhile, and is over, or goes on."""
    leave(files)
    watch, others = Lease._watch, list[Lease]()

    def freeze(self: Lease, first: dict[str, Any]) -> None:
        watch(self, first)
        monkeypatch.setattr(Lease, "_watch", watch)
        others.append(Lease(files))
        if ended:
            others[0].release()

    monkeypatch.setattr(Lease, "_watch", freeze)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.01)
    with pytest.raises(HeldError, match="has taken this folder over from this run"):
        Lease(files)
    assert record(files)["over"], "nobody waits for it"
    if not ended:
        with monkeypatch.context() as patient:  # a newcomer that finds this record waits for the one whose record it lies over
            patient.setattr(lease, "LEASE_SECONDS", NEVER)
            renewal = threading.Timer(0.1, others[0].check)
            renewal.start()
            with pytest.raises(HeldError, match="another run is saving into this folder"):
                Lease(files)
            renewal.join()
        others[0].check()
        assert record(files)["token"] == others[0]._token, "it has the folder still"
        others[0].release()
    Lease(files).release()


def test_commits_made_while_a_run_waits_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.01)
    url = f"local://{tmp_path}/run"
    files = open_files(url)
    assert isinstance(files, RemoteFiles)
    files.make()
    leave(files)
    watch = Lease._watch

    def commit(self: Lease, first: dict[str, Any]) -> None:
        monkeypatch.setattr(Lease, "_watch", watch)
        files.delete(".lock")
        save(url, 2)  # by the run that is waited for
        watch(self, {**first, "over": True})

    monkeypatch.setattr(Lease, "_watch", commit)
    save(url, 1)
    assert [list_steps(files).heads[f"step-0000000{step}"].commit for step in (2, 1)] == [1, 2]


def test_discarding_on_a_store_that_is_away_raises_nothing(files: RemoteFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("the store is away")

    with monkeypatch.context() as away:
        away.setattr(files.system, "info", refuse)
        away.setattr("meshloom.checkpoint.files.RETRY_PAUSES", ())
        RemoteTarget(files, coordinator=False).discard(1, "token")


def test_a_folder_that_can_not_be_listed_is_let_go(files: RemoteFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("the store is away")

    monkeypatch.setattr("meshloom.checkpoint.files.RETRY_PAUSES", ())
    with monkeypatch.context() as away, pytest.raises(UnreadableError, match="the store is away"):
        away.setattr(files.system, "ls", refuse)
        open_target(files.label(), coordinator=True)
    Lease(files).release()


def save(url: str, step: int) -> None:
    run = Checkpointer(url, Control.alone(), CheckpointConfig(mode="sync"))
    run.save(step, fragments(make_arrays(step), 1, 0)[0], {})
    assert [report.outcome for report in run.poll()] == ["committed"]
    run.close()


def test_a_record_that_somebody_tidied_away_is_put_back(files: RemoteFiles) -> None:
    held = Lease(files)
    files.delete(".lock")
    held.check()
    assert record(files)["token"] == held._token
    held.release()


def test_a_store_that_can_not_be_written_is_named(files: RemoteFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no credentials")  # such libraries have errors of their own

    monkeypatch.setattr(files.system, "pipe_file", refuse)
    with pytest.raises(CheckpointError, match=r"\.lock can't be written: ValueError: no credentials"):
        Lease(files)


@pytest.mark.parametrize("known", ["yes", "by the library, not by the store", "no"])
def test_a_file_is_made_anew_only_where_there_is_none(known: str) -> None:
    class Store(fsspec.get_filesystem_class("memory")):
        cachable = False

        if known == "by the library, not by the store":

            def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
                if mode == "create":
                    raise NotImplementedError("A header you provided implies functionality that is not implemented")
                super().pipe_file(path, value)

        elif known == "no":

            def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
                assert not kwargs
                super().pipe_file(path, value)

    files = RemoteFiles(Store(), f"/{uuid4().hex}")
    assert files.write("one", b"1", anew=True)
    assert not files.write("one", b"2", anew=True) and files.read("one") == b"1"
    assert files.write("one", b"3") and files.read("one") == b"3"


def test_a_run_that_was_cut_off_does_not_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.01)
    url = f"local://{tmp_path}/run"
    run = Checkpointer(url, Control.alone(), CheckpointConfig(mode="sync"))
    with pytest.raises(HeldError):
        Checkpointer(url, Control.alone(), CheckpointConfig(mode="sync"))
    run.save(1, fragments(make_arrays(1), 1, 0)[0], {})
    with pytest.raises(HeldError):
        prune(url, 1)
    (tmp_path / "run" / ".lock").write_text(json.dumps(ELSEWHERE))
    run.save(2, fragments(make_arrays(2), 1, 0)[0], {})
    one, two = run.poll()
    assert (one.outcome, two.outcome) == ("committed", "failed")
    assert "other process 7 has taken this folder over" in two.reason
    run.close()
    assert find_latest(url) == f"{url}/step-00000001"
    assert not list((tmp_path / "run").glob("step-00000002/*"))
    assert json.loads((tmp_path / "run" / ".lock").read_text()) == ELSEWHERE
