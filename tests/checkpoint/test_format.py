"""The format as specified in docs/checkpoint.md: a second reader agrees, coverage is proved, digests have their two layers."""

from __future__ import annotations

import importlib.util
import json
import random
import struct
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.digest import block_digests, leaf_digests
from meshloom.checkpoint.errors import CheckpointError
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.manifest import Manifest
from meshloom.checkpoint.planning.coverage import tiling_fault
from meshloom.checkpoint.restore import restore
from meshloom.checkpoint.tools import verify
from meshloom.parallel.box import Box
from support.checkpoint_worlds import fragments, holds, make_arrays, shares, together
from support.old_formats import rewrite_as

READER = Path(__file__).resolve().parents[2] / "docs/read_checkpoint.py"

FORMAT_3 = Path(__file__).resolve().parents[1] / "fixtures/checkpoint_format_3.tar.xz"


def second_reader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("read_checkpoint", READER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step saved by three ranks."""
    folder = tmp_path_factory.mktemp("run")
    ranks = fragments(make_arrays(large=True), 3, 11)

    def body(control: Control) -> None:
        checkpointer = Checkpointer(folder, control, CheckpointConfig(mode="sync", timeout=60))
        checkpointer.save(6, ranks[control.rank], {"note": "héllo"})
        checkpointer.finish()

    together(3, body)
    return folder / "step-00000006"


def test_reader_in_the_docs_reads_all_with_numpy_and_safetensors(step: Path) -> None:
    assert len(READER.read_text().splitlines()) < 135
    checkpoint = second_reader().Checkpoint(step)
    for key, value in make_arrays(large=True).items():
        found = checkpoint[key]
        assert np.array_equal(found, (value.float() if value.dtype == torch.bfloat16 else value).numpy()), key
    assert (checkpoint.step, checkpoint.state) == (6, {"note": "héllo"})
    shown = subprocess.run([sys.executable, READER, step], capture_output=True, text=True, check=True).stdout
    assert "momentum/layers.0.ffn.w1.weight  BF16[64, 24]" in shown
    code = f"import sys; sys.argv = ['x', {str(step)!r}]; exec(open({str(READER)!r}).read()); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_reader_in_the_docs_refuses_what_is_cut_off(step: Path, tmp_path: Path) -> None:
    for path in step.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = tmp_path / "rank-00001.safetensors"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="wrong length"):
        second_reader().Checkpoint(tmp_path)
    data.write_bytes(whole)
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="cut off"):
        second_reader().Checkpoint(tmp_path)


def test_digests_are_computed_as_the_specification_says(step: Path) -> None:
    text = (step / "manifest.json").read_bytes()
    manifest = json.loads(text)
    body = text[: text.rfind(b'"digest": "')]
    assert manifest["digest"] == xxhash.xxh3_128_hexdigest(body)
    for rank, size, header, sealed in manifest["files"]:
        data = (step / f"rank-{rank:05d}.safetensors").read_bytes()
        leaves = b"".join(xxhash.xxh3_128_digest(data[at : at + 4096]) for at in range(0, len(data), 4096))
        blocks = b"".join(xxhash.xxh3_128_digest(leaves[at : at + 65536]) for at in range(0, len(leaves), 65536))
        assert (step / f"rank-{rank:05d}.leaves").read_bytes() == leaves + blocks
        assert (len(data), xxhash.xxh3_128_hexdigest(blocks)) == (size, sealed)
        assert header == 8 + struct.unpack("<Q", data[:8])[0] and header % 4096 == 0


@pytest.mark.parametrize(("version", "known"), [(1, True), (2, True), (3, True), (4, True), (6, False)])
def test_versions_up_to_this_one_are_read_and_later_ones_refused(tmp_path: Path, version: int, known: bool) -> None:
    arrays = make_arrays()  # small: no panels, as in version 1
    (held,) = fragments(arrays, 1, 0)
    checkpointer = Checkpointer(tmp_path, Control.alone(), CheckpointConfig(mode="sync"))
    checkpointer.save(1, held, {})
    checkpointer.finish()
    path = tmp_path / "step-00000001/manifest.json"
    if version < 4:
        rewrite_as(path.parent, version)
    else:
        text = path.read_bytes().replace(b'"version": 4', f'"version": {version}'.encode())
        body = text[: text.rfind(b'"digest": "')]
        path.write_bytes(body + f'"digest": "{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'.encode())
    (blank,) = fragments(arrays, 1, 0, blank=True)
    if known:
        restore(path.parent, blank, Control.alone())
        assert holds([blank], arrays)
        assert all(isinstance(found, int) for found in verify(open_files(path.parent)))
        assert np.array_equal(
            second_reader().Checkpoint(path.parent)["weight/norm.weight"], arrays["weight/norm.weight"].numpy()
        )
        return
    with pytest.raises(CheckpointError, match="version 6"):
        restore(path.parent, blank, Control.alone())
    with pytest.raises(ValueError, match="version"):
        second_reader().Checkpoint(path.parent)


def test_a_step_that_format_3_wrote_is_restored_bit_for_bit(tmp_path: Path) -> None:
    with tarfile.open(FORMAT_3) as archive:
        archive.extractall(tmp_path, filter="data")
    step = tmp_path / "step-00000005"
    assert json.loads((step / "manifest.json").read_text())["version"] == 3
    arrays = {
        "weight/w": torch.arange(48, dtype=torch.float64).reshape(8, 6) / 7,
        "momentum/w": (torch.arange(48, dtype=torch.float32).reshape(8, 6) / -3).bfloat16(),
        "count/seen": torch.arange(11, dtype=torch.int64) * 2**37 + 1,
    }
    assert all(isinstance(found, int) for found in verify(open_files(step)))
    for seed in range(3):  # whole, and cut in other ways than it was saved
        ranks = fragments(arrays, seed + 1, seed, blank=True)
        for rank in ranks:
            assert restore(step, rank, Control.alone(), strict=False).state == {"note": "héllo"}
        assert holds(ranks, arrays)


def test_a_manifest_can_be_read_without_its_arrays(step: Path) -> None:
    text = (step / "manifest.json").read_bytes()
    whole, short = (Manifest.decode(text, "here", arrays=arrays) for arrays in (True, False))
    assert whole.arrays and not short.arrays
    assert replace(whole, arrays={}, tilings=[]) == short


def test_xxh3_of_the_empty_input_is_the_published_value() -> None:
    assert block_digests(b"") == b""
    assert leaf_digests(memoryview(b"")) == b""
    assert xxhash.xxh3_128_hexdigest(b"") == "99aa06d3014798d86001c324468d497f"


def counted(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    """The oracle: count every element."""
    count = np.zeros(shape, int)
    for box in boxes:
        if any(o < 0 or n <= 0 or o + n > s for o, n, s in zip(box.offsets, box.shape, shape, strict=True)):
            return False
        count[box.slices()] += 1
    return bool((count == 1).all())


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6))
def test_coverage_is_proved_iff_each_element_is_in_one_box(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randrange(1, 7) for _ in range(rng.randrange(1, 4)))
    boxes = sorted({box for rank in shares(shape, rng.randrange(1, 5), rng) for box in rank})
    if rng.random() < 0.7:  # spoil it, mostly
        index = rng.randrange(len(boxes))
        what = rng.choice(["drop", "shift", "grow", "repeat"])
        box = boxes[index]
        dim = rng.randrange(len(shape))
        if what == "drop":
            boxes.pop(index)
        elif what == "repeat":
            boxes.append(box)
        else:
            offsets, extent = list(box.offsets), list(box.shape)
            offsets[dim] += rng.choice([-1, 1]) if what == "shift" else 0
            extent[dim] += rng.choice([-1, 1]) if what == "grow" else 0
            boxes[index] = Box(tuple(offsets), tuple(extent))
    assert (tiling_fault(shape, boxes) is None) == counted(shape, boxes)
