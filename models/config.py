"""Config of `model`: the shape of the network."""

from __future__ import annotations

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class LlamaConfig:
    """A Llama-style decoder.

    vocabulary  tokens the model knows; null: the data's tokenizer says
    tied        the head reuses the embedding
    mup_base    width the hyper-parameters were tuned at (muP, arXiv 2408.13359 table 1); null: standard parametrisation
    mup_embedding, mup_residual  muP multipliers of the embedding's output and of each residual branch
    """

    _target_: str = "meshloom.models.llama.Llama"
    name: str = "llama"
    dim: int = MISSING
    layers: int = MISSING
    heads: int = MISSING
    kv_heads: int = MISSING
    ffn_dim: int = MISSING
    vocabulary: int | None = None
    tied: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    init_std: float = 0.02
    mup_base: int | None = None
    mup_embedding: float = 1.0
    mup_residual: float = 1.0


def register(store: ConfigStore) -> None:
    """Make the schemas known to Hydra as model/base_<name>; the recipes of the group extend them."""
    store.store(group="model", name="base_llama", node=LlamaConfig)
