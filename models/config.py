"""Config of `model`: the shape of the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config.keys import MISSING, Side, key, option, target


@dataclass
class LlamaConfig:
    """A Llama-style decoder."""

    SIDE: ClassVar[Side] = Side.RECIPE

    _target_: str = target("meshloom.models.llama.Llama")
    name: str = option("llama")
    dim: int = key(MISSING, "width of the stream between blocks")
    layers: int = key(MISSING, "number of blocks")
    heads: int = key(MISSING, "query heads; they divide dim")
    kv_heads: int = key(MISSING, "key and value heads; they divide heads")
    ffn_dim: int = key(MISSING, "inner width of the feed-forward part")
    vocabulary: int | None = key(None, "tokens the model knows; null: the data's tokenizer says")
    tied: bool = key(False, "the head reuses the embedding")
    norm_eps: float = key(1e-5, "added to the mean square in RMSNorm")
    rope_theta: float = key(500_000.0, "base of the rotary positions' wavelengths")
    init_std: float = key(0.02, "standard deviation of the initial weights")
    mup_base: int | None = key(
        None, "width the hyper-parameters were tuned at (muP, arXiv 2408.13359 table 1); null: standard parametrisation"
    )
    mup_embedding: float = key(1.0, "muP multiplier of the embedding's output")
    mup_residual: float = key(1.0, "muP multiplier of each residual branch")


OPTIONS: tuple[type, ...] = (LlamaConfig,)
"""Schemas of the group, known to Hydra as model/base_<name>; the recipes of the group extend them."""
