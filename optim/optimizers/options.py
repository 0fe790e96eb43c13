"""The options of the group `optim`."""

from __future__ import annotations

from .config import (
    AdaGradConfig,
    AdaGradNormConfig,
    AdamWConfig,
    AdEMAMixConfig,
    AGVMConfig,
    LAMBConfig,
    LARSConfig,
    LionConfig,
    ScheduleFreeConfig,
)
from .eight_bit_config import AdamW8bitConfig
from .frugal_config import FRUGALConfig
from .matrix_config import (
    AdafactorConfig,
    APOLLOConfig,
    GaLoreConfig,
    MuonConfig,
    NaturalGaLoreConfig,
    NorMuonConfig,
    SOAPConfig,
)

OPTIONS: tuple[type, ...] = (
    AdamWConfig,
    AGVMConfig,
    LAMBConfig,
    LARSConfig,
    AdaGradConfig,
    AdaGradNormConfig,
    MuonConfig,
    NorMuonConfig,
    SOAPConfig,
    APOLLOConfig,
    GaLoreConfig,
    AdafactorConfig,
    LionConfig,
    AdamW8bitConfig,
    FRUGALConfig,
    NaturalGaLoreConfig,
    AdEMAMixConfig,
    ScheduleFreeConfig,
)
"""Schemas of the group, known to Hydra as optim/base_<name>; the recipes of the group extend them."""
