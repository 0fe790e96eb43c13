"""The table of precisions, against PyTorch's own dtypes."""

from __future__ import annotations

import pytest
import torch

from meshloom.config.precision import PRECISIONS
from meshloom.parallel.engine import EngineSettings


@pytest.mark.parametrize("name", PRECISIONS)
def test_sizes_are_those_of_the_engines_dtypes(name: str) -> None:
    settings, precision = EngineSettings(seed=1, precision=name), PRECISIONS[name]
    assert (settings.compute.itemsize, settings.storage.itemsize) == (precision.bytes, precision.accum_bytes)


def test_each_name_is_the_dtype_it_says() -> None:
    found = {name: EngineSettings(seed=1, precision=name).compute for name in PRECISIONS}
    assert found == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
