"""The headers of a step's files are held to the manifest before a byte of theirs is used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import DamageError
from meshloom.checkpoint.files import LocalFiles, open_files
from meshloom.checkpoint.folder import load_manifest, open_step
from meshloom.checkpoint.manifest import Manifest
from meshloom.checkpoint.planning.tiling import Tiling
from meshloom.checkpoint.reading import index
from meshloom.checkpoint.reading.index import FileIndex
from meshloom.checkpoint.reading.reader import Reader
from meshloom.checkpoint.restore import restore
from meshloom.parallel.box import Box
from support.checkpoint_worlds import fragments, make_arrays, together
from support.old_formats import rewrite_as


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A step saved by two ranks."""
    ranks = fragments(make_arrays(large=True), 2, 5)

    def body(control: Control) -> None:
        checkpointer = Checkpointer(tmp_path, control, CheckpointConfig(mode="sync", timeout=60))
        checkpointer.save(1, ranks[control.rank], {})
        checkpointer.finish()

    together(2, body)
    return tmp_path / "step-00000001"


@pytest.mark.parametrize(
    ("version", "name"),
    [(4, "rank-00001.safetensors"), (4, "rank-00001.leaves"), (3, "rank-00001.safetensors"), (2, "rank-00001.safetensors")],
)
def test_a_file_of_another_length_is_refused_by_who_reads_it(step: Path, version: int, name: str) -> None:
    if version < 4:
        rewrite_as(step, version)
    with (step / name).open("ab") as file:
        file.write(b"more")
    (blank,) = fragments(make_arrays(large=True), 1, 0, blank=True)
    with pytest.raises(DamageError, match=rf"{name}: the file has \d+ bytes, not \d+"):
        restore(step, blank, Control.alone())


@pytest.mark.parametrize("kept", [index.PARTS_KEPT, 0])
def test_parts_of_arrays_cut_alike_are_derived_once(step: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    parts, derived = Tiling.parts, list[int]()

    def counted(tiling: Tiling, item_bytes: int, turn: int, box: Box | None = None) -> Iterator[tuple[int, Box]]:
        derived.append(turn)
        return parts(tiling, item_bytes, turn, box)

    monkeypatch.setattr(Tiling, "parts", counted)
    monkeypatch.setattr(index, "PARTS_KEPT", kept)
    manifest = open_step(open_files(step))
    array = max(manifest.arrays.values(), key=lambda each: each.bytes)
    wanted = [(array, Box.whole(array.shape)), (array, Box((0,) * len(array.shape), array.shape))] * 2
    first, *rest = Reader(open_files(step), manifest).read(wanted)
    assert len(derived) == 1 and all(np.array_equal(first, other) for other in rest)
    half = Box((0,) * len(array.shape), (array.shape[0] // 2, *array.shape[1:]))
    assert np.array_equal(Reader(open_files(step), manifest).read([*wanted, (array, half), *wanted])[4], first[: half.shape[0]])


def test_the_length_of_a_file_is_asked_for_once(step: Path) -> None:
    asked: list[str] = []

    class Watched(LocalFiles):
        def size(self, name: str) -> int | None:
            asked.append(name)
            return super().size(name)

    files = Watched(step)
    manifest = load_manifest(files)
    reader = Reader(files, manifest)
    for array in manifest.arrays.values():
        reader.read([(array, Box.whole(array.shape))])
    assert sorted(asked) == sorted(name for file in manifest.files for name in (file.name, file.leaves))


def test_files_must_hold_as_many_bytes_as_the_arrays_have(step: Path) -> None:
    manifest = load_manifest(open_files(step))
    (step / "manifest.json").write_bytes(replace(manifest, files=manifest.files[:1]).encode())
    with pytest.raises(DamageError, match=r"its arrays have \d+ bytes, and its files hold \d+"):
        open_step(open_files(step))


def headers(step: Path) -> tuple[Manifest, bytes]:
    manifest = load_manifest(open_files(step))
    return manifest, (step / manifest.files[0].name).read_bytes()[: manifest.files[0].header]


def test_boxes_are_found_where_the_header_says(step: Path) -> None:
    manifest, header = headers(step)
    index = FileIndex.parse(manifest, 0, header, "here")
    entries = json.loads(header[8:])
    del entries["__metadata__"]
    for key, array in manifest.arrays.items():
        for box in manifest.tilings[array.tiling].written_by(0, array.item_bytes, array.turn):
            entry = entries.pop(f"{key}@{','.join(map(str, box.offsets))}")
            found = index.find(array, box)
            assert [found.start, found.stop] == [len(header) + at for at in entry["data_offsets"]]
            assert found.panels == (entry["shape"][0] if len(entry["shape"]) > len(box.shape) else 1)
    assert not entries, "the file has what nobody looks for"
    near = np.stack([index.names - np.uint64(1), index.names], 1).reshape(-1)  # equal, if they were rounded to float64
    crowded = replace(index, names=near, starts=index.starts.repeat(2), panels=index.panels.repeat(2))
    for array in manifest.arrays.values():
        for box in manifest.tilings[array.tiling].written_by(0, array.item_bytes, array.turn):
            assert crowded.find(array, box) == index.find(array, box)
    array = manifest.arrays["weight/head.weight"]
    with pytest.raises(DamageError, match=r"here: its header and the manifest disagree: F32 box weight/head.weight@1,1"):
        index.find(array, Box((1, 1), (2, 2)))


@pytest.mark.parametrize("spoil", ["shape", "range", "type", "length", "text"])
def test_a_header_that_makes_no_sense_is_damage(step: Path, spoil: str) -> None:
    manifest, header = headers(step)
    entries = json.loads(header[8:])
    entry = entries[next(name for name in entries if name.startswith("weight/layers.0.ffn.w1.weight@"))]
    entry |= {"shape": {"shape": [7]}, "range": {"data_offsets": [2**40, 2**40 + 8]}, "type": {"dtype": "F64"}}.get(spoil, {})
    text = json.dumps(entries).encode().ljust(len(header) - 8)[: len(header) - 8]
    if spoil == "length":
        text = text[:-1]
    if spoil == "text":
        text = b"{" * len(text)
    with pytest.raises(DamageError, match="here: its header and the manifest disagree"):
        FileIndex.parse(manifest, 0, len(text).to_bytes(8, "little") + text, "here")
