"""`meshloom train` with something about its mixtures altered, to measure what that costs.

    python benchmarks/altered_train.py balanced,grouped recipe=moe_a1b trainer.steps=20

balanced  experts are given to tokens in turn, whatever their scores are: torchtitan has the same for benchmarks
          (`--debug.moe_force_load_balance`). Scores, gates and their gradients stay
grouped   experts are computed by PyTorch's grouped products, as where the kernels of `kernels/experts/` can't be used
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import sys

import torch

from meshloom.kernels.experts import fused
from meshloom.launch.train import main
from meshloom.models.mixture import router


def choose_in_turn(
    scores_TE: torch.Tensor, bias_E: torch.Tensor | None, top_k: int, groups: int, top_groups: int
) -> torch.Tensor:
    """Stand in for `choose_experts`."""
    tokens, count = scores_TE.shape
    return (torch.arange(tokens * top_k, device=scores_TE.device) % count).view(tokens, top_k)


def alter(names: str) -> None:
    """Put the alterations in place."""
    for name in names.split(","):
        if name == "balanced":
            router.choose_experts = choose_in_turn  # type: ignore[assignment]
        elif name == "grouped":
            fused.unsupported_reason = lambda _device: "a benchmark wants PyTorch's grouped products"  # type: ignore[assignment]
        else:
            raise SystemExit(f"there is no '{name}'; alterations are balanced, grouped")


if __name__ == "__main__":
    alter(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
