"""Count what optimizers keep of a parameter, from their configs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from .config import (
    AdaGradConfig,
    AdaGradNormConfig,
    AdamWConfig,
    AdEMAMixConfig,
    AGVMConfig,
    LAMBConfig,
    LARSConfig,
    LionConfig,
    OptimConfig,
    ScheduleFreeConfig,
)
from .eight_bit_config import AdamW8bitConfig
from .frugal_config import FRUGALConfig
from .matrix_config import (
    AdafactorConfig,
    LowRankConfig,
    MatrixOptimConfig,
    MuonConfig,
    NaturalGaLoreConfig,
    NorMuonConfig,
    SOAPConfig,
)

_ARRAYS: dict[type[OptimConfig], int] = {
    AdamWConfig: 2,
    AGVMConfig: 2,
    LAMBConfig: 2,
    LARSConfig: 1,
    LionConfig: 1,
    AdEMAMixConfig: 3,
    ScheduleFreeConfig: 3,
    AdaGradConfig: 1,
    AdaGradNormConfig: 0,
}
"""Config of an optimizer → arrays of the weights' shape that it keeps."""


@dataclass(frozen=True)
class StateSize:
    """Size of the state that an optimizer keeps of one parameter.

    element  bytes for each element, where the element is
    owned    bytes for the whole parameter, of which each stacked matrix's part lies on the rank that owns it
    """

    element: float
    owned: float = 0.0


def state_size(config: OptimConfig, shape: tuple[int, ...], unit: int, *, hidden: bool, stacked: int = 1) -> StateSize | None:
    """Return what an optimizer keeps of a parameter; None for a class of the user's own.

    unit: bytes of an element of the masters; hidden, stacked: see `NamedParameter`
    """
    arrays = _ARRAYS.get(type(config))
    if arrays is not None:
        return StateSize(arrays * unit)
    if isinstance(config, AdamW8bitConfig):
        if len(shape) != 2 or shape[0] * shape[1] < config.min_size:
            return StateSize(2 * unit)
        return StateSize(2 + 2 * unit * -(-shape[1] // config.block) / shape[1])
    if isinstance(config, FRUGALConfig):
        return StateSize(2 * unit * (-(-shape[1] // config.period) / shape[1] if hidden else 1))
    if not isinstance(config, MatrixOptimConfig):
        return None
    if not hidden:
        return StateSize(2 * unit)
    rows, columns = shape[0] // stacked, shape[1]
    local = unit if isinstance(config, MuonConfig) else 0
    return StateSize(local, unit * stacked * _owned_elements(config, rows, columns))


def _owned_elements(config: MatrixOptimConfig, rows: int, columns: int) -> int:
    """Count the elements of the arrays that a matrix's owner keeps."""
    short, long = sorted((rows, columns))
    if isinstance(config, NorMuonConfig):
        return rows
    if isinstance(config, SOAPConfig):
        return 2 * rows * columns + sum(2 * side**2 for side in (rows, columns) if side <= config.max_dim)
    if isinstance(config, AdafactorConfig):
        return rows + columns
    if isinstance(config, LowRankConfig):
        rank = min(config.rank, short)
        history = config.history if isinstance(config, NaturalGaLoreConfig) else 0
        return (2 + history) * rank * long + short * rank + (1 if config.name == "apollo" else 0)
    return 0
