"""Token shards on an object store: the samples of the same shards in a folder, copied once, refused where they are damaged."""

from __future__ import annotations

import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from meshloom.data.config import ShardsConfig
from meshloom.data.nodes import Tokenized
from meshloom.data.shards.manifest import ShardError
from meshloom.data.shards.writer import ShardWriter


def write(folder: Path, first: int) -> None:
    for name, documents in (("train", 40), ("validation", 4)):
        with ShardWriter(folder / name, vocabulary=300, end_of_document=0) as writer:
            for number in range(documents):
                writer.add(np.array([first + number, *range(1, 3 + number), 0]))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """The URL of shards in a store, which lie in a folder, too."""
    write(tmp_path / "shards", 100)
    url, system = f"memory://{uuid.uuid4().hex}/corpus", fsspec.filesystem("memory")
    system.put(f"{tmp_path}/shards", url, recursive=True)
    yield url
    system.rm(url, recursive=True)


def node(path: str, cache: Path, **keys: str) -> Tokenized:
    made = Tokenized(ShardsConfig(path=path, seq_len=16, cache_dir=str(cache), **keys), 1)
    assert made.problems() == []
    made.prepare()
    return made


def test_samples_are_those_of_the_folder(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = set[int](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), fsync(file)))
    here, there = node(str(tmp_path / "shards"), tmp_path / "cache"), node(store, tmp_path / "cache")
    assert there.fingerprint == here.fingerprint
    for number in range(50):
        np.testing.assert_array_equal(there.train()[number].tokens, here.train()[number].tokens)
    named = node(f"{store}/train", tmp_path / "cache", validation=f"{store}/validation")
    assert named.fingerprint == here.fingerprint
    fetched = sorted((tmp_path / "cache/fetched").iterdir())
    assert len(fetched) == 2, "training and validation shards are copied once"
    assert all(file.stat().st_ino in synced for folder in fetched for file in folder.iterdir()), "whole after a power cut, too"


def test_shards_that_changed_are_copied_again(tmp_path: Path, store: str) -> None:
    before = node(store, tmp_path / "cache").fingerprint
    write(tmp_path / "other", 200)
    fsspec.filesystem("memory").rm(store, recursive=True)
    fsspec.filesystem("memory").put(f"{tmp_path}/other", store, recursive=True)
    assert node(store, tmp_path / "cache").fingerprint != before


def test_damaged_and_missing_shards_are_refused(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system, file = fsspec.filesystem("memory"), f"{store}/train/documents-00000.bin"
    whole = system.cat_file(file)
    contents = bytearray(whole)
    contents[10] ^= 1
    system.pipe_file(file, bytes(contents))
    with pytest.raises(ShardError, match=r"documents-00000.bin: damaged"):
        node(store, tmp_path / "cache")
    assert not any((tmp_path / "cache/fetched").glob("shards-*")), "nothing incomplete has the name of what is whole"
    system.pipe_file(file, whole)
    copied, get_file = list[str](), type(system).get_file
    monkeypatch.setattr(
        type(system),
        "get_file",
        lambda self, path, *more, **keys: (copied.append(Path(path).name), get_file(self, path, *more, **keys)),
    )
    node(f"{store}/train", tmp_path / "cache", validation=f"{store}/validation")
    counts = Counter(name.partition("-")[0] for name in copied)
    assert counts["tokens"] == 1 and counts.total() == 5, f"tokens of train were whole: {copied}"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(ShardError, match=r"which has 0.00 GB free; free some, or set data.cache_dir"):
        node(store, tmp_path / "another")
    system.pipe_file(f"{store}/train/dataset.json", b"{")
    with pytest.raises(ShardError, match=rf"{store}/train/dataset.json: damaged"):
        node(store, tmp_path / "another")
    monkeypatch.undo()
    system.put(f"{tmp_path}/shards/train/dataset.json", f"{store}/train/dataset.json")
    system.rm(file)
    with pytest.raises(ShardError, match=r"documents-00000.bin: not found"):
        node(store, tmp_path / "third")
    (problem,) = Tokenized(ShardsConfig(path=f"{store}/none"), 1).problems()
    assert problem.key == "data.path" and "holds no token shards" in problem.message
    (problem,) = Tokenized(ShardsConfig(path="nosuch://bucket/none"), 1).problems()
    assert "can't be read" in problem.message and "credentials" in problem.fix
