"""Config of `parallel.deepspeed`: what only the DeepSpeed engine has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DeepSpeedConfig:
    """The DeepSpeed engine's own settings. Everything else it needs is derived from the recipe.

    cpu_adam  update offloaded state with DeepSpeed's CPU Adam, which is compiled on first use; otherwise with torch's fused
              AdamW on the CPU, which needs no compiler
    config    further keys of DeepSpeed's own configuration, as its documentation nests them, for example
              `parallel.deepspeed.config.zero_optimization.reduce_bucket_size=100000000`. A key that the recipe decides is
              refused by name
    """

    cpu_adam: bool = False
    config: dict[str, Any] = field(default_factory=dict)
