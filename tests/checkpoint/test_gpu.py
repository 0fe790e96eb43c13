"""On a GPU: the snapshot runs on a stream of its own and has the values before the update; the trainer's stream waits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.restore import restore
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment

pytestmark = pytest.mark.gpu


def held(tensors: list[torch.Tensor]) -> list[Fragment]:
    return [Fragment(f"t{i}", "weight", tuple(t.shape), Box.whole(t.shape), t) for i, t in enumerate(tensors)]


@pytest.mark.parametrize(("mode", "late"), [("sync", 0.0), ("async", 0.0), ("async", 0.05), ("async", 1.0)])
def test_a_snapshot_is_not_torn_by_the_update_that_follows(tmp_path: Path, mode: str, late: float) -> None:
    """late: seconds that an earlier save is said to have held up the update, so that spare memory takes a part, or all."""
    device = torch.device("cuda")
    tensors = [torch.zeros(4096, 4096, device=device), torch.zeros(1000, 7, device=device, dtype=torch.bfloat16)]
    tensors += [torch.zeros(513, 257, device=device).t(), torch.zeros((), device=device, dtype=torch.float64)]
    work = torch.randn(4096, 4096, device=device)
    checkpointer = Checkpointer(tmp_path, Control.alone(), CheckpointConfig(mode=mode, keep=0))
    checkpointer.prepare(held(tensors))
    gpu = checkpointer._context.device
    assert gpu is not None
    gpu.learn(late, 1e9, 10**9)
    outcomes: list[str] = []
    for step in range(1, 9):
        checkpointer.save(step, held(tensors), {"value": step - 1}, required=True)
        for _ in range(20):
            work = (work @ work).sigmoid()  # the next forward and backward
        checkpointer.before_update()
        for tensor in tensors:
            tensor.add_(1)
        outcomes += [report.outcome for report in checkpointer.poll()]
    outcomes += [report.outcome for report in checkpointer.finish()]
    assert outcomes == ["committed"] * 8
    assert gpu.spare_bytes > 0 or not late  # a slow copy makes it learn by itself, too
    for step in range(1, 9):
        back = [torch.full_like(tensor, -1) for tensor in tensors]
        report = restore(tmp_path / f"step-{step:08d}", held(back), Control.alone())
        assert report.state == {"value": step - 1}
        assert all(bool((tensor == step - 1).all()) for tensor in back), step
    assert torch.isfinite(work).all()
