"""Config of `optim`: how a gradient becomes an update."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore


@dataclass
class AdamWConfig:
    """AdamW.

    lr            peak learning rate (`schedule` moves it), or auto:step_law
    weight_decay  of matrices; norms, biases and embeddings have none
    lr_coupling   how the learning rate follows a batch size that changes: none, sqrt, linear, sqrt_saturating
    fused         one kernel for the whole update; null: where the device has it
    """

    _target_: str = "meshloom.optim.adamw.AdamW"
    name: str = "adamw"
    lr: float | str = 3e-4
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    lr_coupling: str = "none"
    fused: bool | None = None


def register(store: ConfigStore) -> None:
    """Make the schemas known to Hydra as optim/base_<name>; the recipes of the group extend them."""
    for schema in (AdamWConfig,):
        store.store(group="optim", name=f"base_{schema.name}", node=schema)
