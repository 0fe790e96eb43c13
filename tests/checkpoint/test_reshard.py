"""Save on any layout, restore on any other: every bit of every array comes back, and only the bytes needed are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import torch.distributed as dist

from meshloom.checkpoint import restore as restoring
from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import CheckpointError
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import find_latest, load_manifest
from meshloom.checkpoint.reading import shared_reader
from meshloom.checkpoint.restore import read_state, restore
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from support.checkpoint_runs import stored_boxes
from support.checkpoint_worlds import fragments, holds, make_arrays, same_bits, together
from support.ranks import run_ranks


def save(folder: Path, ranks: list[list[Fragment]], step: int = 1, mode: str = "sync", state: dict | None = None) -> None:
    def body(control: Control) -> None:
        checkpointer = Checkpointer(folder, control, CheckpointConfig(mode=mode, timeout=60))
        checkpointer.save(step, ranks[control.rank], state or {"step": step}, required=True)
        checkpointer.before_update()
        checkpointer.finish()

    together(len(ranks), body)


@pytest.mark.parametrize("seed", range(12))
def test_any_layout_to_any_other_and_back(tmp_path: Path, seed: int) -> None:
    arrays = make_arrays(seed)
    first, second = [(1, 2), (2, 4), (4, 1), (3, 8), (8, 2), (2, 3)][seed % 6]
    here = fragments(arrays, first, 100 + seed)
    save(tmp_path / "a", here)
    there = fragments(arrays, second, 200 + seed, blank=True)
    together(second, lambda control: restore(tmp_path / "a", there[control.rank], control))
    assert holds(there, arrays)
    save(tmp_path / "b", there)
    back = fragments(arrays, first, 100 + seed, blank=True)
    together(first, lambda control: restore(tmp_path / "b", back[control.rank], control))
    assert holds(back, arrays)


def test_panels_of_large_arrays_are_read_by_rows_and_columns(tmp_path: Path) -> None:
    arrays = make_arrays(large=True)
    save(tmp_path, fragments(arrays, 2, 5))
    whole = arrays["weight/head.weight"]
    step = find_latest(tmp_path)
    assert {stored.panels for stored in stored_boxes(step, "weight/head.weight")} == {5}
    for box in (Box((0, 100), (4096, 137)), Box((256, 0), (256, 1100)), Box((1000, 500), (3, 333)), Box.whole((4096, 1100))):
        tensor = torch.zeros(box.shape)
        report = restore(step, [Fragment("head.weight", "weight", (4096, 1100), box, tensor)], Control.alone(), strict=False)
        assert same_bits(tensor, whole[box.slices()])
        assert report.bytes_wanted == box.numel * 4


@pytest.mark.parametrize(("count", "side"), [(1, 2048), (64, 256)])
def test_reading_an_eighth_reads_little_more_than_an_eighth(tmp_path: Path, count: int, side: int) -> None:
    arrays = [torch.randn(side, side) for _ in range(count)]
    arrays.insert(0, torch.randn(3))  # what is not a multiple of the unit of checking must not shift the others off its grid
    held = [Fragment(f"w{i}", "weight", tuple(w.shape), Box.whole(w.shape), w) for i, w in enumerate(arrays)]
    save(tmp_path, [held])
    for box in (Box((side // 4, 0), (side // 8, side)), Box((0, 3 * side // 8), (side, side // 8))):
        wanted = [Fragment(f"w{i}", "weight", (side, side), box, torch.zeros(box.shape)) for i in range(1, count + 1)]
        report = restore(tmp_path, wanted, Control.alone(), strict=False)
        assert all(same_bits(part.tensor, whole[box.slices()]) for part, whole in zip(wanted, arrays[1:], strict=True))
        assert report.bytes_read <= 1.2 * report.bytes_wanted


def test_replicas_are_written_once_and_dealt_evenly(tmp_path: Path) -> None:
    arrays = {f"weight/p{i}": torch.randn(1000, 50 + i) for i in range(40)}
    ranks = [
        [Fragment(k.split("/")[1], "weight", tuple(v.shape), Box.whole(v.shape), v) for k, v in arrays.items()]
        for _ in range(4)
    ]
    save(tmp_path, ranks)
    manifest = load_manifest(open_files(find_latest(tmp_path)))
    sizes = [file.bytes for file in manifest.files]
    assert len(sizes) == 4
    total = sum(v.numel() * 4 for v in arrays.values())
    assert sum(sizes) < total * 1.01
    assert max(sizes) < 1.05 * total / 4


def test_async_and_sync_saves_are_byte_identical(tmp_path: Path) -> None:
    arrays = make_arrays(3, large=True)
    for mode in ("sync", "async"):
        save(tmp_path / mode, fragments(arrays, 2, 9), mode=mode)
    names = sorted(path.name for path in (tmp_path / "sync/step-00000001").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "async/step-00000001").iterdir())
    for name in names:
        one, other = (tmp_path / mode / "step-00000001" / name for mode in ("sync", "async"))
        assert one.read_bytes() == other.read_bytes(), name


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    arrays = make_arrays()
    save(tmp_path, fragments(arrays, 1, 0))
    with safetensors.safe_open(tmp_path / "step-00000001/rank-00000.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("weight/norm.weight@0"), arrays["weight/norm.weight"].numpy())


def test_state_is_plain_json_and_anything_else_is_refused(tmp_path: Path) -> None:
    state = {"step": 7, "data": {"samples": 12345678901234}, "rng": [1, 2], "wandb": "abc", "half": 0.1}
    save(tmp_path, fragments(make_arrays(), 1, 0), 7, state=state)
    assert read_state(tmp_path / "step-00000007") == state
    assert json.loads((tmp_path / "step-00000007/manifest.json").read_text())["state"] == state
    checkpointer = Checkpointer(tmp_path, Control.alone(), CheckpointConfig(mode="sync"))
    for bad in ({"x": float("nan")}, {"x": torch.ones(1)}, {"x": (1, 2)}, {1: 2}):
        with pytest.raises(CheckpointError, match="state"):
            checkpointer.save(8, [], bad)
    checkpointer.close()


def test_other_element_types_are_converted_and_said(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    save(tmp_path, [[Fragment("w", "weight", (6, 4), Box.whole((6, 4)), weight)]])
    half = torch.zeros(6, 4, dtype=torch.bfloat16)
    report = restore(tmp_path, [Fragment("w", "weight", (6, 4), Box.whole((6, 4)), half)], Control.alone())
    assert report.converted == {"weight/w": "F32 → BF16"}
    assert torch.equal(half, weight.bfloat16())


def test_other_optimizer_is_refused_if_strict_else_reported(tmp_path: Path) -> None:
    def ranks(role: str, shape: tuple[int, ...] = (6, 4)) -> list[list[Fragment]]:
        boxes = [Box((0, 0), (3, shape[1])), Box((3, 0), (shape[0] - 3, shape[1]))]
        return [[Fragment("w", r, shape, box, torch.full(box.shape, 5.0)) for r in ("weight", role)] for box in boxes]

    save(tmp_path, ranks("exp_avg"))
    for wrong in (ranks("momentum"), ranks("exp_avg", (6, 5))):
        before = [f.tensor.clone() for rank in wrong for f in rank]
        for f in (f for rank in wrong for f in rank):
            f.tensor.fill_(9)
        with pytest.raises(CheckpointError, match=r"does not fit|holds arrays"):
            together(2, lambda control, wrong=wrong: restore(tmp_path, wrong[control.rank], control))
        assert all(bool((f.tensor == 9).all()) for rank in wrong for f in rank)
        assert before
    new = ranks("momentum")
    reports = together(2, lambda control: restore(tmp_path, new[control.rank], control, strict=False))
    assert reports[1].missing == ["momentum/w"]
    assert reports[1].unused == ["exp_avg/w"]


def _refused_in_group(rank: int, world: int, folder: str) -> str:
    if rank:
        restoring.open_folder = lambda path: pytest.fail("the first rank opens it for all")
    control = Control(rank, world, dist.FileStore(f"{folder}/store", world))
    with pytest.raises(CheckpointError) as error:
        restore(f"hf:{folder}", [], control, timeout=60, group=dist.group.WORLD)
    return str(error.value)


def test_every_rank_is_told_why_the_first_can_not_open_a_folder(tmp_path: Path) -> None:
    first, other = run_ranks(2, _refused_in_group, str(tmp_path))
    assert first == other and "config.json" in first


def test_smaller_run_never_silently_drops_state_of_other_ranks(tmp_path: Path) -> None:
    save(tmp_path, fragments(make_arrays(), 2, 3))
    some = [f for f in fragments(make_arrays(), 1, 0, blank=True)[0] if f.role == "weight"]
    with pytest.raises(CheckpointError, match=r"exp_avg/embed\.weight"):
        restore(tmp_path, some, Control.alone())


def _restore_in_group(rank: int, world: int, folder: str, seed: int) -> tuple[bool, int, int]:
    if seed % 2:
        shared_reader.WINDOW_BYTES = 2**20  # many windows to a file, and arrays that lie in several
    arrays = make_arrays(seed, large=True)
    ranks = fragments(arrays, world, 300 + seed, blank=True)
    control = Control(rank, world, dist.FileStore(f"{folder}/store{seed}", world))
    report = restore(folder, ranks[rank], control, timeout=60, group=dist.group.WORLD)
    return holds([ranks[rank]], arrays), report.bytes_read, report.bytes_wanted


@pytest.mark.parametrize("seed", range(4))
def test_with_a_process_group_every_byte_is_read_by_one_rank(tmp_path: Path, seed: int) -> None:
    arrays = make_arrays(seed, large=True)
    save(tmp_path, fragments(arrays, 2, 200 + seed))
    results = run_ranks(3, _restore_in_group, str(tmp_path), seed)
    assert all(right for right, _, _ in results)
    stored = sum(file.bytes for file in load_manifest(open_files(find_latest(tmp_path))).files)
    # Leaves at the edges, headers and the digests of the leaves may be read by more than one.
    assert sum(read for _, read, _ in results) <= 1.02 * stored + 3 * 2 * 2**16


def _damaged_in_group(rank: int, world: int, folder: str) -> str:
    ranks = fragments(make_arrays(0, large=True), world, 4, blank=True)
    control = Control(rank, world, dist.FileStore(f"{folder}/store", world))
    report = restore(folder, ranks[rank], control, timeout=60, group=dist.group.WORLD)
    return f"{report.step} {report.skipped}"


def test_damage_read_on_one_rank_sends_all_to_the_older_step(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, fragments(make_arrays(0, large=True), 2, 9), step)
    data = tmp_path / "step-00000002/rank-00000.safetensors"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    for result in run_ranks(3, _damaged_in_group, str(tmp_path)):
        assert result.startswith("1 ")
        assert "rank-00000.safetensors" in result
