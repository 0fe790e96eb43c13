"""Files of others that would run code when read: nothing in them is run, and what holds no tensors is refused."""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo  # pyright: ignore[reportPrivateUsage]

from meshloom.checkpoint.convert.pickles import load_mapped
from meshloom.checkpoint.errors import CheckpointError
from meshloom.launch.checkpoint import main


def touch(path: Path) -> None:
    path.touch()


class Bomb:
    """Unpickled as usual, it calls a function."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call = (call, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_objects_of_other_classes_are_inert(tmp_path: Path) -> None:
    kinds: dict[str, Any] = defaultdict(list)
    kinds["a"].append(3)
    content = {"bomb": Bomb(touch, tmp_path / "went_off"), "x": torch.ones(3), "kinds": kinds, "size": torch.Size([2])}
    torch.save(content, tmp_path / "file.pt")
    read = load_mapped(tmp_path / "file.pt")
    assert torch.equal(read["x"], torch.ones(3))
    assert (read["kinds"], read["size"]) == ({"a": [3]}, torch.Size([2]))
    assert not (tmp_path / "went_off").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_call_of_the_system_is_refused(tmp_path: Path, legacy: bool) -> None:
    bomb = Bomb(os.system, f"touch {tmp_path / 'went_off'}")
    torch.save({"x": torch.ones(3), "bomb": bomb}, tmp_path / "file.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"file\.pt"):
        load_mapped(tmp_path / "file.pt")
    with (tmp_path / "plain.pt").open("wb") as file:
        pickle.dump(bomb, file)
    with pytest.raises(CheckpointError, match=r"plain\.pt"):
        load_mapped(tmp_path / "plain.pt")
    assert not (tmp_path / "went_off").exists()


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(300)}, tmp_path / "file.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "file.pt").read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        load_mapped(tmp_path / "cut.pt")


def test_an_archive_of_torchscript_is_never_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deepspeed"
    folder.mkdir()
    flat = {"single_partition_of_fp32_groups": [torch.ones(4)], "base_optimizer_state": {"state": {}}, "zero_stage": 1}
    torch.save({"param_shapes": [{"w": torch.Size([4])}]}, folder / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": flat}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert main(["import", str(folder), str(tmp_path / "good")]) == 0
    file = folder / "mp_rank_00_model_states.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: touch(tmp_path / "went_off"))  # it runs code from the archive
    assert main(["import", str(folder), str(tmp_path / "bad")]) == 1
    assert str(file) in capsys.readouterr().err
    assert not (tmp_path / "went_off").exists()


@pytest.mark.parametrize("fault", ["call", "path"])
def test_the_index_of_a_dcp_folder_runs_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    folder = tmp_path / "dcp"
    torch_dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=folder, no_dist=True)
    index = torch_dcp.FileSystemReader(folder).read_metadata()
    if fault == "call":
        index.planner_data = Bomb(touch, tmp_path / "went_off")
    else:
        place, stored = next(iter(index.storage_data.items()))
        index.storage_data[place] = _StorageInfo("../elsewhere.distcp", stored.offset, stored.length)
        (folder / stored.relative_path).rename(tmp_path / "elsewhere.distcp")
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 1
    assert ("test_pickles.touch" if fault == "call" else "elsewhere.distcp") in capsys.readouterr().err
    assert not (tmp_path / "went_off").exists()
