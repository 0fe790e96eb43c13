"""A rank that can't use what it reads for others goes on serving them, and they learn of what kind the fault is."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from meshloom.checkpoint import files as files_module
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import CheckpointError
from meshloom.checkpoint.files import LocalFiles
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.reading.shared_reader import PASSED_ON, SharedReader
from meshloom.checkpoint.restore import restore
from meshloom.parallel.box import Box
from support.checkpoint_runs import save_steps
from support.checkpoint_worlds import fragments, make_arrays
from support.ranks import run_ranks

KEY = "weight/embed.weight"


def _read_with_a_fault(rank: int, world: int, folder: Path, fault: Exception) -> tuple[Exception | None, str]:
    """Read with rank 1 at fault, and restore. Return what the reading raises, and what the restore says."""

    def refuse(*_: Any) -> Any:
        raise fault

    files_module.RETRY_PAUSES = ()
    files = LocalFiles(folder / "step-00000001")
    manifest = load_manifest(files)
    if rank == 1:
        os.preadv = refuse
    found: Exception | None = None
    try:
        SharedReader(files, manifest, dist.group.WORLD).read([(manifest.arrays[KEY], Box.whole(manifest.arrays[KEY].shape))])
    except (CheckpointError, MemoryError) as error:
        found = error
    control = Control(rank, world, dist.FileStore(f"{folder}/store", world))
    with pytest.raises((CheckpointError, MemoryError)) as caught:
        restore(folder, fragments(make_arrays(), 1, 0, blank=True)[0], control, timeout=10.0, group=dist.group.WORLD)
    return found, str(caught.value)


@pytest.mark.parametrize(
    ("fault", "kinds", "told"),
    [
        (OSError(errno.EIO, "the disk is away"), ["UnreadableError", "UnreadableError"], "the disk is away. It need not be"),
        (OSError(errno.EBADMSG, "a bad sector"), ["DamageError", "DamageError"], "a bad sector"),
        (MemoryError("no room"), ["UnreadableError", "MemoryError"], "no room"),
    ],
)
def test_the_others_learn_of_what_kind_a_fault_is(tmp_path: Path, fault: Exception, kinds: list[str], told: str) -> None:
    save_steps(tmp_path, 1)
    (heard, there), (met, here) = run_ranks(2, _read_with_a_fault, tmp_path, fault, timeout=20.0)
    assert [type(heard).__name__, type(met).__name__] == kinds
    assert PASSED_ON in str(heard) and PASSED_ON not in str(met)
    assert told in there and told in here
