"""Engine settings of a model in a layout, with its blocks divided as the trainer divides them."""

from __future__ import annotations

from typing import Any

from meshloom.models.protocol import Model
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.division import divide_blocks
from meshloom.parallel.engine import EngineSettings
from meshloom.parallel.policies import ActivationSettings


def settings_of(
    model: Model,
    parallel: ParallelConfig,
    activation: str = "none",
    budget: float | None = None,
    *,
    precision: str = "fp64",
    compile: bool = False,
    seq_len: int = 0,
    **others: Any,
) -> EngineSettings:
    """The settings; `others` are fields of `EngineSettings`."""
    wanted = ActivationSettings(activation, budget, precision, compile)
    policies, stages = divide_blocks(model.decoder_config, len(model.block_modules()), parallel, wanted, seq_len)
    return EngineSettings(policies=policies, stages=stages, precision=precision, compile=compile, seq_len=seq_len, **others)
