"""The outer optimizer: SGD with momentum on the mean difference of the islands, elementwise.

x is the outer weight, d the mean over islands of (x − an island's weight), each counted by the tokens it has learned from:

    m ← momentum · m + d        where `clip` is given, then cut to [−clip, clip]
                                x ← x − lr · (d + momentum · m)    with Nesterov's momentum
                                x ← x − lr · m                     without

DiLoCo (arXiv 2311.08105) takes Nesterov's at 0.7 and 0.9; CO2 (arXiv 2401.16265) the heavy ball, one round late; local SGD
(arXiv 1805.09767) lr 1 without momentum, which is the mean of the islands' weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .config import LocalConfig


@torch.no_grad()
def outer_step(
    config: LocalConfig, weights: Sequence[torch.Tensor], momenta: Sequence[torch.Tensor], differences: Sequence[torch.Tensor]
) -> None:
    """Update outer weights and momenta in place. Lists of tensors of equal shapes; `differences` are used up.

    momenta: () without momentum
    """
    if not weights:
        return
    weights, differences = list(weights), list(differences)
    if config.momentum:
        moving = list(momenta)
        torch._foreach_mul_(moving, config.momentum)
        torch._foreach_add_(moving, differences)
        if config.clip is not None:
            torch._foreach_clamp_min_(moving, -config.clip)
            torch._foreach_clamp_max_(moving, config.clip)
        if config.nesterov:
            torch._foreach_add_(differences, moving, alpha=config.momentum)
        else:
            differences = moving
    torch._foreach_add_(weights, differences, alpha=-config.lr)
