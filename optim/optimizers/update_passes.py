"""Count what an update reads and writes where PyTorch's own operations compute it, from configs. Imports no torch."""

from __future__ import annotations

from .config import (
    AdaGradConfig,
    AdaGradNormConfig,
    AdamWConfig,
    AdEMAMixConfig,
    LAMBConfig,
    LARSConfig,
    LionConfig,
    OptimConfig,
    ScheduleFreeConfig,
)
from .eight_bit_config import AdamW8bitConfig
from .frugal_config import FRUGALConfig

FUSED_ADAMW = 7
"""Of torch's fused AdamW: weight, gradient and two moments are read, and all but the gradient written."""
_PASSES: dict[type[OptimConfig], float] = {
    AdamWConfig: 21,
    LAMBConfig: 30,
    LARSConfig: 15,
    LionConfig: 13,
    AdEMAMixConfig: 35,
    ScheduleFreeConfig: 30,
    AdaGradConfig: 14,
    AdaGradNormConfig: 9,
    AdamW8bitConfig: 58,
}
"""Config of an optimizer → arrays of the weights' shape, in the masters' dtype, that a step's operations read and write."""


def update_passes(config: OptimConfig) -> float:
    """Return how many arrays of a weight's shape, in the masters' dtype, a step's operations read and write for it.

    Of optimizers of whole matrices this is AdamW's, which updates everything else; so it is of a class of the user's own.
    """
    if isinstance(config, AdamWConfig):
        return _PASSES[AdamWConfig] if config.fused is False else FUSED_ADAMW
    if isinstance(config, FRUGALConfig):
        return 14 + 24 / config.period  # moments of one column in `period`
    return _PASSES.get(type(config), FUSED_ADAMW)
