"""Progress of long work on files: hashing a corpus, verifying shards, copying them; done once, and told once."""

from __future__ import annotations

import errno
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from meshloom.config import progress_bar
from meshloom.data.config import ShardsConfig
from meshloom.data.documents import identity
from meshloom.data.documents.sources import TextFiles
from meshloom.data.nodes import Tokenized
from meshloom.data.shards import manifest, reader
from meshloom.data.shards.reader import TokenShards
from meshloom.data.shards.remote import RemoteShards
from meshloom.data.shards.writer import ShardWriter


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text("x" * 1000)
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "shards", vocabulary=300, shard_tokens=500) as writer:
        for _ in range(4):
            writer.add(np.arange(300))
    return tmp_path / "shards"


def test_hashing_tells_how_far_it_is(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    TextFiles(str(files)).identity(files / ".quick")
    assert capsys.readouterr().err == "", "nothing of what is done soon"
    monkeypatch.setattr(progress_bar, "EVERY", 0.0)
    TextFiles(str(files)).identity(files / ".memo")
    said = capsys.readouterr().err.splitlines()
    assert said == [f"hashing 0.00 GB in 4 files: {share}%" for share in (25, 50, 75, 100)]
    TextFiles(str(files)).identity(files / ".memo")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    TextFiles(str(files)).identity(files / ".other")
    assert capsys.readouterr().err.splitlines() == said, "of ranks that srun starts, any may be the one that works"


def test_verifying_tells_how_far_it_is(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_bar, "EVERY", 0.0)
    TokenShards(shards)
    assert capsys.readouterr().err == ""
    TokenShards(shards, verify=True)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and said[-1] == f"verifying 0.00 GB in {shards}: 100%", "tokens and documents of two shards"
    monkeypatch.setenv("LOCAL_RANK", "1")
    TokenShards(shards, verify=True)
    assert capsys.readouterr().err == ""


def test_copying_tells_how_far_it_is(shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress_bar, "EVERY", 0.0)
    url = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").put(str(shards), url, recursive=True)
    RemoteShards(url).fetch(shards.parent / "cache")
    said = capsys.readouterr().err.splitlines()
    title = f"copying 4 files (0.00 GB) from {url}"
    assert said[0] == f"{title} …" and len(said) > 4 and said[-1] == f"{title}: 100%"
    RemoteShards(url).fetch(shards.parent / "cache")
    assert capsys.readouterr().err == "", "they are there"


def test_processes_that_start_together_hash_once(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts that share a cache; each would read the whole corpus."""
    read: list[Path] = []

    def digest(path: Path, count: Any = None) -> str:
        read.append(path)
        time.sleep(0.1)
        return manifest.digest_file(path, count)

    monkeypatch.setattr(identity, "digest_file", digest)
    found: list[str] = []
    hosts = [threading.Thread(target=lambda: found.append(TextFiles(str(files)).identity(tmp_path / "memo"))) for _ in range(3)]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join()
    assert len(found) == 3 and len(set(found)) == 1 and len(read) == 4
    assert len(list((tmp_path / "memo").iterdir())) == 1, "no lock stays"


def test_one_rank_of_a_host_verifies(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(reader, "digest_file", lambda path, count: (read.append(path), manifest.digest_file(path))[1])

    def prepare() -> int:
        read.clear()
        Tokenized(ShardsConfig(path=str(shards), seq_len=8, verify=True, cache_dir=str(tmp_path)), 1).prepare()
        return len(read)

    assert prepare() == 4
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert prepare() == 4, "nobody waits for the first rank where there is no folder to wait in"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt/1/error.json"))
    assert prepare() == 0
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert prepare() == 4


def test_a_fault_of_reading_names_the_file(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open file's error has no name: the run then named the cache, and advised to make room there."""
    opened = Path.open

    class Failing:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def read(self, size: int = -1) -> bytes:
            if size > 100:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return self.file.read(size)

    monkeypatch.setattr(
        Path,
        "open",
        lambda self, *more, **keys: (
            Failing(opened(self, *more, **keys)) if self.suffix == ".txt" else opened(self, *more, **keys)
        ),
    )
    with pytest.raises(OSError, match="Input/output") as hashing:
        TextFiles(str(files)).identity(files / ".memo")
    with pytest.raises(OSError, match="Input/output") as reading:
        list(TextFiles(str(files)).read(files / "2.txt"))
    assert [hashing.value.filename, reading.value.filename] == [str(files / "0.txt"), str(files / "2.txt")]
