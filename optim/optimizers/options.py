"""The options of the group `optim`."""

from __future__ import annotations

from .config import AdaGradConfig, AdaGradNormConfig, AdamWConfig, AGVMConfig, LAMBConfig, LARSConfig, LionConfig
from .eight_bit_config import AdamW8bitConfig
from .matrix_config import AdafactorConfig, APOLLOConfig, GaLoreConfig, MuonConfig, NorMuonConfig, SOAPConfig

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
)
"""Schemas of the group, known to Hydra as optim/base_<name>; the recipes of the group extend them."""
