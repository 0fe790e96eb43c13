"""The parts of a torch engine that tests look into."""

from __future__ import annotations

from typing import Any

from meshloom.parallel.torch.engine import TorchEngine
from meshloom.parallel.torch.masters import MasterWeights


def masters_of(engine: Any) -> MasterWeights:
    """The strategy of an engine whose weights are all whole beside sharded masters."""
    assert isinstance(engine, TorchEngine)
    (strategy,) = engine.weights.strategies
    assert isinstance(strategy, MasterWeights)
    return strategy
