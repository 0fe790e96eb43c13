"""Snapshots put together in files instead of memory: the same checkpoints, and no file is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import CheckpointError
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.reading.compare import read_array
from meshloom.checkpoint.saving.staging import StagingBuffer, StagingPool
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_checkpoints_by_way_of_a_folder_hold_what_was_saved(tmp_path: Path, mode: str) -> None:
    config = CheckpointConfig(mode=mode, snapshot_folder=str(tmp_path / "fast"))
    values = torch.randn(700, 300)
    checkpointer = Checkpointer(tmp_path / "run", Control.alone(), config)
    saved = values
    for step in (1, 2):
        saved = values.clone()
        checkpointer.save(step, [Fragment("w", "weight", (700, 300), Box.whole((700, 300)), values)], {}, required=True)
        checkpointer.before_update()
        values += 1
    checkpointer.finish()
    files = open_files(tmp_path / "run/step-00000002")
    assert torch.equal(read_array(files, load_manifest(files), "weight/w"), saved)
    assert list((tmp_path / "fast").iterdir()) == []


def test_staging_buffer_in_a_folder_is_one_file_at_a_time(tmp_path: Path) -> None:
    pool = StagingPool(None, count=1, pin=True, folder=str(tmp_path / "fast"))
    pool.reserve(3 * 2**20)
    buffer = pool.lend(3 * 2**20, 0.0)
    assert not pool.has_room(1)
    assert str(tmp_path / "fast") in str(Path(f"/proc/self/fd/{buffer.descriptor}").readlink())
    assert os.fstat(buffer.descriptor).st_blocks * 512 >= buffer.size
    pool.take_back(buffer)
    pool.close()


def test_a_folder_without_room_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"snapshot_folder=.*file"):
        StagingBuffer(2**20, pin=False, folder=str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"GiB for a snapshot"):
        StagingBuffer(2**58, pin=False, folder=str(tmp_path))


@pytest.mark.parametrize("other", [{"memory_every": 10}, {"host_memory_gib": 4.0}])
def test_keys_that_do_not_go_with_it_are_refused(other: dict[str, float]) -> None:
    found = CheckpointConfig(snapshot_folder="/fast", **other).problems()  # type: ignore[arg-type]
    assert [problem.key for problem in found] == ["checkpoint.snapshot_folder"]
