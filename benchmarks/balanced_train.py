"""`meshloom train` with a forced balance: experts are given to tokens in turn, whatever their scores are.

    python benchmarks/balanced_train.py recipe=moe_a1b trainer.steps=20

torchtitan has the same, for benchmarks (`--debug.moe_force_load_balance`). Scores, gates and their gradients stay.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import sys

import torch

from meshloom.launch.train import main
from meshloom.models.mixture import mixture


def choose_in_turn(
    scores_TE: torch.Tensor, bias_E: torch.Tensor | None, top_k: int, groups: int, top_groups: int
) -> torch.Tensor:
    """Stand in for `choose_experts`."""
    tokens, count = scores_TE.shape
    return (torch.arange(tokens * top_k, device=scores_TE.device) % count).view(tokens, top_k)


if __name__ == "__main__":
    mixture.choose_experts = choose_in_turn  # type: ignore[assignment]
    sys.exit(main(sys.argv[1:]))
