"""Config of `trainer`: how long to train, how to take a step, and when to look up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainerConfig:
    """Length of the run and the habits of its loop.

    steps, tokens   end of the run: give one
    max_grad_norm   clip the global gradient norm to this; null: never
    eval_every      evaluate every so many steps, or after any duration ('4k samples', '5%'); null: only at the end; 0: never
    eval_samples    samples of the validation set per evaluation
    activation      what the forward pass keeps for the backward pass: none (keep all), selective, full, offload
    activation_budget  with activation=none: share of it, in (0, 1], that may be kept; the rest is computed again, as little
                    as can be (selectively in some blocks, then fully in some); null: all
    compile         torch.compile each block
    float8          matrix products of the blocks in float8 with scales per tensor (tensorwise) or per row and column (rowwise)
    profile_step    where the time of this step goes: a table of kernels and a trace in <output_dir>/profile; null: of none
    hooks           the user's own hooks, each a node with a `_target_`
    sample_prompt   text the model continues at the end of the run; null: none
    sample_tokens   how many tokens it adds
    """

    steps: int | None = None
    tokens: int | None = None
    max_grad_norm: float | None = 1.0
    eval_every: int | float | str | None = 100
    eval_samples: int = 64
    activation: str = "none"
    activation_budget: float | None = None
    compile: bool = False
    float8: str = "none"
    profile_step: int | None = None
    hooks: list[Any] = field(default_factory=list)
    sample_prompt: str | None = None
    sample_tokens: int = 200
