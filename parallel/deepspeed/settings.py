"""Config of `parallel.deepspeed`: what only the DeepSpeed engine has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...config.keys import Side, key


@dataclass(frozen=True)
class DeepSpeedConfig:
    """The DeepSpeed engine's own settings. Everything else it needs is derived from the recipe.

    `config` nests as DeepSpeed's documentation does, for example
    `parallel.deepspeed.config.zero_optimization.reduce_bucket_size=100000000`.
    """

    SIDE: ClassVar[Side] = Side.PLACEMENT

    cpu_adam: bool = key(
        False, "update offloaded state with DeepSpeed's CPU Adam, which is compiled on first use; false: torch's fused AdamW"
    )
    config: dict[str, Any] = key(
        {}, "further keys of DeepSpeed's own configuration, nested as there; one that the recipe decides is refused by name"
    )
