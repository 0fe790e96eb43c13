"""Features of a run that can't keep a rule of the promise in full: said at its start, as in ARCHITECTURE.md's table."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from hydra.utils import get_object
from omegaconf import DictConfig

from ..optim.optimizers.agvm import AGVM


def bent_rules(config: DictConfig) -> Iterator[str]:
    """One line for each. Engines say theirs themselves: float8, keys of DeepSpeed's own."""
    optimizer = get_object(config.optim._target_)
    if inspect.isclass(optimizer) and issubclass(optimizer, AGVM):
        yield "optim=agvm: its halves of a batch are halves of the ranks, so losses depend a little on the layout (R4)"
    if "multiple" in config.batch and config.batch.multiple is None:
        yield (
            "batch.multiple is not set: sizes are rounded to what the layout can cut, so another layout may take other "
            "batches (R1); set it to fix them"
        )
