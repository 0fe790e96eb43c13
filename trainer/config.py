"""Config of `trainer`: how long to train, how to take a step, and when to look up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..config.keys import Side, key


@dataclass
class TrainerConfig:
    """Length of the run and the habits of its loop."""

    SIDE: ClassVar[Side] = Side.RECIPE

    steps: int | None = key(None, "length of the run in steps; give this or tokens")
    tokens: int | None = key(None, "length of the run in tokens; give this or steps")
    max_grad_norm: float | None = key(1.0, "clip the global gradient norm to this; null: never")
    eval_every: int | float | str | None = key(
        100, "evaluate every so many steps, or after any duration ('4k samples', '5%'); null: only at the end; 0: never"
    )
    eval_samples: int = key(64, "samples of the validation set per evaluation")
    activation: str = key(
        "none", "what the forward pass keeps for the backward pass: none (keep all), selective, full or offload", Side.PLACEMENT
    )
    activation_budget: float | None = key(
        None,
        "with activation=none: share of it, in (0, 1], that may be kept; the rest is computed again, as little as can be"
        " (selectively in some blocks, then fully in some); null: all",
        Side.PLACEMENT,
    )
    compile: bool = key(False, "torch.compile each block", Side.PLACEMENT)
    float8: str = key(
        "none", "matrix products of the blocks in float8 with scales per tensor (tensorwise) or per row and column (rowwise)"
    )
    profile_step: int | None = key(
        None, "profile this step: a table of kernels and a trace in <output_dir>/profile; null: of none", Side.HABIT
    )
    hooks: list[Any] = key([], "your own hooks, each a node with a `_target_`", Side.HABIT)
    sample_prompt: str | None = key(None, "text the model continues at the end of the run; null: none", Side.HABIT)
    sample_tokens: int = key(200, "how many tokens it adds to sample_prompt", Side.HABIT)
