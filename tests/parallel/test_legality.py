"""The values that engines are given are computed without PyTorch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from meshloom.models.config import DecoderConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.division import divide_blocks
from meshloom.parallel.policies import ActivationSettings

SHAPE = DecoderConfig(dim=64, layers=8, heads=4, kv_heads=2, ffn_dim=128, vocabulary=64)


def test_legality_and_division_import_no_torch() -> None:
    code = "import sys, meshloom.parallel.legality, meshloom.parallel.division; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_blocks_are_divided_by_written_layers() -> None:
    parallel = ParallelConfig(pp=2, stage_layers=[3, 5])
    policies, stages = divide_blocks(SHAPE, 8, parallel, ActivationSettings("full"), 32)
    assert policies == ("full",) * 8
    assert stages.layers == [range(0, 3), range(3, 8)] and stages.ranks == [0, 1]


def test_a_model_of_no_known_shape_is_one_stage() -> None:
    policies, stages = divide_blocks(None, 3, ParallelConfig(), ActivationSettings("selective"), 32)
    assert policies == ("selective",) * 3 and stages.layers == [range(3)] and stages.held_by(0) == [0]


def test_a_budget_too_small_is_said() -> None:
    with pytest.raises(ValueError, match="can't keep"):
        divide_blocks(SHAPE, 8, ParallelConfig(), ActivationSettings(budget=0.01), 32)
