"""Object stores through fsspec: no renames there, so the manifest comes last and files have names of their own."""

from __future__ import annotations

import errno
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest

from meshloom.checkpoint import faults
from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import DamageError, UnreadableError
from meshloom.checkpoint.files import RemoteFiles
from meshloom.checkpoint.folder import find_latest
from meshloom.checkpoint.restore import read_state, restore
from meshloom.checkpoint.saving.commit import RemoteTarget
from meshloom.config.problems import ConfigError
from meshloom.launch.checkpoint import main
from support.checkpoint_worlds import fragments, holds, make_arrays, together


@pytest.fixture(params=["sync", "async"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder that fsspec gives access to, for runs that save in this mode."""
    monkeypatch.setattr("meshloom.checkpoint.lease.WATCH_SECONDS", 0.01)
    yield f"local://{tmp_path}/{request.param}/run"
    faults.install(None)


def save(url: str, *steps: int, world: int = 2, keep: int = 0, seed: int = 0) -> list[str]:
    mode = url.split("/")[-2]

    def body(control: Control) -> list[str]:
        checkpointer = Checkpointer(url, control, CheckpointConfig(mode=mode, keep=keep, timeout=60, failures=9))
        outcomes: list[str] = []
        for step in steps:
            held = fragments(make_arrays(step + seed), world, 3)[control.rank]
            checkpointer.save(step, held, {"step": step, "seed": seed}, required=True)
            checkpointer.before_update()
        while len(outcomes) < len(steps):
            outcomes += [report.outcome for report in checkpointer.poll()]
        checkpointer.close()
        return outcomes

    return together(world, body)[0]


def restored(url: str, world: int = 3) -> int:
    ranks = fragments(make_arrays(), world, 8, blank=True)
    report = together(world, lambda control: restore(url, ranks[control.rank], control, timeout=60))[0]
    assert holds(ranks, make_arrays(report.step + report.state["seed"]))
    return report.step


def test_save_restore_prune_verify(url: str) -> None:
    assert find_latest(url) is None
    assert save(url, 1, 2, 3, keep=2) == ["committed"] * 3
    assert find_latest(url) == f"{url}/step-00000003"
    assert read_state(f"{url}/step-00000003") == {"step": 3, "seed": 0}
    assert restored(url) == 3
    assert main(["verify", f"{url}/step-00000002"]) == 0
    assert main(["verify", f"{url}/step-00000001"]) == 1


@pytest.mark.parametrize("boundary", ["manifest.put.after", "latest.put.after"])
def test_concurrent_pruning_keeps_the_step_becoming_latest(url: str, boundary: str) -> None:
    targets: list[RemoteTarget] = []
    pruning: list[threading.Thread] = []
    commit = RemoteTarget.commit

    def noted(self: RemoteTarget, *arguments: Any) -> None:
        targets.append(self)
        commit(self, *arguments)

    def prune(reached: str, amount: int) -> int:
        if reached == boundary and len(targets) == 3:
            pruning.append(threading.Thread(target=lambda: targets[-1].prune(2)))
            pruning[-1].start()
            pruning[-1].join(0.5)  # as long as it takes, if nothing keeps it
        return amount

    faults.install(prune)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteTarget, "commit", noted)
        assert save(url, 1, 2, 3, keep=2) == ["committed"] * 3
    pruning[0].join()
    assert restored(url) == 3


def test_a_step_saved_again_replaces_the_old_in_one_move(url: str) -> None:
    save(url, 5)
    save(url, 5, seed=100)
    assert restored(url) == 5
    system, path = fsspec.core.url_to_fs(url)
    assert len(system.ls(f"{path}/step-00000005", detail=False)) == 5  # two ranks' data and leaves, the manifest


def test_without_its_manifest_a_step_is_not_there(url: str) -> None:
    save(url, 1)

    def broken(boundary: str, amount: int) -> int:
        if boundary == "manifest.put.before":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return amount

    faults.install(broken)
    assert save(url, 2) == ["failed"]
    faults.install(None)
    assert restored(url) == 1
    system, path = fsspec.core.url_to_fs(url)
    names = [name.rpartition("/")[2] for name in system.ls(f"{path}/step-00000001", detail=False)]
    system.rm(f"{path}/step-00000001/{next(name for name in names if name.endswith('.safetensors'))}")
    ranks = fragments(make_arrays(), 1, 8, blank=True)
    with pytest.raises(DamageError, match="missing"):
        restore(f"{url}/step-00000001", ranks[0], Control.alone())


def failing_at(name: str) -> faults.Hook:
    def hook(boundary: str, amount: int) -> int:
        if boundary == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return amount

    return hook


@pytest.mark.parametrize("boundary", ["manifest.put.after", "latest.put.after"])
def test_files_of_the_manifest_survive_a_later_failure(url: str, boundary: str) -> None:
    assert save(url, 1, 2) == ["committed"] * 2
    faults.install(failing_at(boundary))
    assert save(url, 2, seed=100) == ["failed"]
    faults.install(None)
    assert main(["verify", url]) == 0
    assert restored(url) == 2
    assert save(url, 3) == ["committed"]


def test_leftovers_of_crashed_saves_go_with_the_next_commit(url: str) -> None:
    system, path = fsspec.core.url_to_fs(url)
    save(url, 1)
    for step in (2, 9):  # one of the past, and one that somebody may still be writing
        system.makedirs(f"{path}/step-0000000{step}")
        system.pipe_file(f"{path}/step-0000000{step}/rank-00000-0123456789ab.safetensors", b"half of it")
    save(url, 3)
    found = sorted(name.rpartition("/")[2] for name in system.ls(path, detail=False) if "step-" in name)
    assert found == ["step-00000001", "step-00000003", "step-00000009"]


class Remembering(fsspec.get_filesystem_class("memory")):
    """A store whose client believes its last listing of a folder, as those of S3 and GCS do."""

    cachable = False
    believed: ClassVar[dict[str, list[str]]] = {}

    def ls(self, path: str, detail: bool = True, **kwargs: object) -> list[str]:
        path = self._strip_protocol(path)
        return self.believed.setdefault(path, super().ls(path, detail=False, **kwargs))

    def size(self, path: str) -> int:
        path = self._strip_protocol(path)
        if path not in self.believed.get(self._parent(path), [path]):
            raise FileNotFoundError(path)
        return super().size(path)

    def invalidate_cache(self, path: str | None = None) -> None:
        while path and path != "/":
            self.believed.pop(path, None)
            path = self._parent(path)


def test_a_file_that_another_rank_has_just_written_is_seen() -> None:
    system = Remembering()
    files = RemoteFiles(system, f"/{uuid.uuid4().hex}")
    files.write("one", b"1")
    assert files.names() == ["one"]
    files.write("other", b"22")
    assert (files.size("other"), files.size("absent")) == (2, None)


def test_the_memory_tier_needs_a_mounted_folder(url: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.memory_every"):
        Checkpointer(url, Control.alone(), CheckpointConfig(memory_every=1))


def test_errors_of_a_store_library_become_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        pass

    class Store:
        def __getattr__(self, name: str) -> Callable[..., None]:
            def refuse(*_: object, **__: object) -> None:
                raise Refused("no credentials")

            return refuse

        def unstrip_protocol(self, path: str) -> str:
            return f"store://{path}"

    files = RemoteFiles(Store(), "bucket/run")
    told = "Refused: no credentials"
    monkeypatch.setattr("meshloom.checkpoint.folder.open_files", lambda _: files)
    monkeypatch.setattr("meshloom.checkpoint.files.RETRY_PAUSES", (0.0,))
    for write in (lambda: files.write("one", b""), lambda: files.delete("one")):
        with pytest.raises(OSError, match=told):
            write()
    with files.reader("one") as reader:
        reads = (
            files.names,
            files.sizes,
            lambda: find_latest("broken://"),
            lambda: files.size("one"),
            lambda: files.read("one"),
            lambda: reader.fill(memoryview(bytearray(1)), 0),
        )
        for read in reads:
            with pytest.raises(UnreadableError, match=told):
                read()


RANGE = OSError(errno.EINVAL, "The requested range is not satisfiable")


@pytest.mark.parametrize(
    ("answer", "length", "error", "tries"),
    [
        (RANGE, 4, DamageError, 1),  # the file ends before
        (RANGE, 3, UnreadableError, 4),
        (PermissionError("Access Denied"), 3, UnreadableError, 1),  # libraries of stores give no errno
        (IsADirectoryError("one"), 3, DamageError, 1),
        (MemoryError("no room"), 3, MemoryError, 1),  # it says nothing about the store
        (b"1234", 3, DamageError, 1),
    ],
)
def test_what_a_store_gives_for_a_range_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    answer: Exception | bytes,
    length: int,
    error: type[Exception],
    tries: int,
) -> None:
    asked: list[int | None] = []

    class Store(fsspec.get_filesystem_class("memory")):
        cachable = False

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
            asked.append(end)
            if isinstance(answer, bytes):
                return answer
            raise answer

    files = RemoteFiles(Store(), f"/{uuid.uuid4().hex}")
    files.write("one", b"123")
    monkeypatch.setattr("meshloom.checkpoint.files.RETRY_PAUSES", (0.0, 0.0, 0.0))
    with files.reader("one") as reader, pytest.raises(error):
        reader.fill(memoryview(bytearray(length)), 0)
    assert len(asked) == tries
    assert caplog.text.count("it is tried again") == (tries > 1)
