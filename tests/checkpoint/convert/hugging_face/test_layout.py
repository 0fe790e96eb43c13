"""Weights that the files have in other pieces: transposed, stacked, interleaved, or cut into several tensors."""

from __future__ import annotations

import errno
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from meshloom.checkpoint import files as files_module
from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.convert.hugging_face.folder import open_folder
from meshloom.checkpoint.convert.hugging_face.reading import fill
from meshloom.checkpoint.errors import CheckpointError
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.reading.compare import read_array
from meshloom.launch.checkpoint import main
from meshloom.models.config import DecoderConfig
from meshloom.models.families import FAMILIES, StoredPart, StoredWeights
from meshloom.models.families.llama import Llama
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from support.models import decoder
from support.ranks import run_ranks

SHAPE: dict[str, Any] = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 12, "vocabulary": 29}


class Odd(Llama):
    """A family whose files have everything in another way."""

    model_type = "odd"

    def stored_weights(self, config: DecoderConfig) -> StoredWeights:
        """Map each kind of weight in its own way."""
        found = super().stored_weights(config)
        width = config.ffn_dim
        for layer in range(config.layers):
            ours = f"layers.{layer}"
            found[f"{ours}.attention.wq.weight"] = (StoredPart(f"{layer}.q", transposed=True),)
            found[f"{ours}.attention.wo.weight"] = tuple(StoredPart(f"{layer}.o.{part}") for part in range(4))
            found[f"{ours}.ffn.w1.weight"] = (StoredPart("gate_up", (0, 2 * width), 2, (layer,), transposed=True),)
            found[f"{ours}.ffn.w3.weight"] = (StoredPart("gate_up", (1, 2 * width), 2, (layer,), transposed=True),)
            found[f"{ours}.attention_norm.weight"] = (StoredPart("norms", index=(layer, 0)),)
            found[f"{ours}.ffn_norm.weight"] = (StoredPart("norms", index=(layer, 1)),)
        return found


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights of a run that is exported to `theirs` in the odd family's way."""
    monkeypatch.setitem(FAMILIES, "odd", Odd())
    torch.manual_seed(0)
    weights = {name: parameter.detach() for name, parameter in decoder(**SHAPE).named_parameters()}
    held = [Fragment(name, "weight", tuple(p.shape), Box.whole(p.shape), p) for name, p in weights.items()]
    checkpointer = Checkpointer(tmp_path / "run", Control.alone(), CheckpointConfig(mode="sync"))
    checkpointer.save(1, held, {"config": {"model": {"_target_": "meshloom.models.decoder.Decoder", **SHAPE}}})
    checkpointer.finish()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "theirs"), "--family", "odd", "--shard-size=3KB"]) == 0
    return weights


def test_the_files_have_them_in_the_family_s_way(tmp_path: Path, saved: dict[str, torch.Tensor]) -> None:
    files = (tmp_path / "theirs").glob("*.safetensors")
    theirs = {name: value for file in files for name, value in safetensors.torch.load_file(file).items()}
    assert torch.equal(theirs["1.q"], saved["layers.1.attention.wq.weight"].T)
    assert torch.equal(torch.cat([theirs[f"0.o.{part}"] for part in range(4)]), saved["layers.0.attention.wo.weight"])
    up = torch.stack([saved["layers.1.ffn.w1.weight"], saved["layers.1.ffn.w3.weight"]], dim=1).flatten(0, 1)
    assert theirs["gate_up"].shape == (2, 16, 24) and torch.equal(theirs["gate_up"][1], up.T)
    assert torch.equal(theirs["norms"][1, 1], saved["layers.1.ffn_norm.weight"])


def test_an_import_brings_them_back(tmp_path: Path, saved: dict[str, torch.Tensor]) -> None:
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "back")]) == 0
    files = open_files(tmp_path / "back/step-00000000")
    manifest = load_manifest(files)
    assert {f"weight/{name}" for name in saved} == manifest.arrays.keys()
    assert all(torch.equal(read_array(files, manifest, f"weight/{name}"), value) for name, value in saved.items())


def test_any_box_is_read_by_itself(tmp_path: Path, saved: dict[str, torch.Tensor]) -> None:
    folder = open_folder(tmp_path / "theirs")
    wanted: list[tuple[str, Box, torch.Tensor]] = []
    for name, value in saved.items():
        for first, last in ((0, 1), (1, value.shape[0] - 1), (3, 5)):
            inner = tuple((extent // 3, extent // 2) for extent in value.shape[1:])
            box = Box((first, *(at for at, _ in inner)), (last - first, *(length for _, length in inner)))
            wanted.append((name, box, torch.full(box.shape, torch.nan, dtype=torch.float64)))
    traffic = fill(folder, wanted)
    for name, box, found in wanted:
        assert torch.equal(found, saved[name][box.slices()].double()), (name, box)
    assert 0 < traffic.wanted < sum(value.nbytes for value in saved.values())


def fill_with_a_fault(rank: int, _: int, theirs: Path, fault: str) -> str:
    """Body for `run_ranks`: rank 0 wants nothing of the first file. Rank 1 shortens it, or can't read. Returns the error."""
    folder = open_folder(theirs)

    def read_from(name: str) -> set[int]:
        found = ((folder.tensors[placed.part.name], placed.region(placed.box)) for placed in folder.placed[name])
        return {array.boxes[0].file for tensor, region in found for array, _ in tensor.sources(region)}

    shapes = {array.name: array.shape for array in folder.manifest.arrays.values()}
    wanted = [
        (name, Box.whole(shape), torch.zeros(shape)) for name, shape in shapes.items() if rank or 0 not in read_from(name)
    ]
    assert wanted
    dist.barrier()
    if rank and fault != "shorter":
        files_module.RETRY_PAUSES = ()
        files_module.os.preadv = raise_io_error if fault == "unreadable" else raise_memory_error  # of this process, which ends
    elif rank:
        first = theirs / folder.stored.files[0].title
        first.write_bytes(first.read_bytes()[:-1000])
    dist.barrier()
    told, held = "", weakref.ref(wanted[0][2])
    gc.disable()  # of this process, which ends: what a failed import leaves behind is large
    try:
        fill(folder, wanted, dist.group.WORLD)
    except (CheckpointError, MemoryError) as error:
        told = str(error)
    wanted.clear()
    assert held() is None
    return told


def raise_io_error(*_: object) -> int:
    """Fail as a disk does."""
    raise OSError(errno.EIO, "Input/output error")


def raise_memory_error(*_: object) -> int:
    """Fail as a reading for which there is no memory."""
    raise MemoryError("no memory for model-00001-of")


@pytest.mark.parametrize("fault", ["shorter", "unreadable", "memory"])
def test_a_rank_that_meets_a_fault_keeps_nobody_waiting(fault: str, tmp_path: Path, saved: dict[str, torch.Tensor]) -> None:
    sound, faulty = run_ranks(2, fill_with_a_fault, tmp_path / "theirs", fault, timeout=30.0)
    assert sound == "" and "model-00001-of" in faulty
