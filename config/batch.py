"""Config of `batch`: how many samples a step takes, and how many a rank takes at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class BatchConfig:
    """samples: global batch in sequences (its start, where a controller changes it); micro: sequences per rank and pass."""

    _target_: str = "meshloom.optim.batch.Fixed"
    name: str = "fixed"
    samples: int = 32
    micro: int = 8
