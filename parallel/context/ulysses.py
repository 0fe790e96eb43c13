"""Ulysses: context parallelism by two all-to-alls per attention (DeepSpeed-Ulysses, arXiv 2309.14509).

Outside attention every rank holds a contiguous slice of all sequences with all heads; inside, whole sequences with a share
of the heads, so that any plain attention, documents included, is used as it is.

Shape legend: B rows, T positions of a slice, S = N·T positions of whole rows, N ranks, H query heads, K key/value heads,
X all heads of one rank inside attention, D head dim.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd

from ...kernels.attention import Attend
from ...kernels.documents import Documents


def ulysses_attend(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    documents: Documents | None = None,
    *,
    group: dist.ProcessGroup,
    attend: Attend,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attend` over whole rows, of which each rank of `group` holds a slice, in rank order. Returns (B, T, H, D).

    H is a multiple of the number of ranks. Key/value heads that do not divide by it are repeated until they do (their
    gradients are summed again).
    documents: of the whole rows, the same on every rank.
    """
    ranks = group.size()
    assert q_BTHD.shape[2] % ranks == 0, f"{q_BTHD.shape[2]} heads on {ranks} ranks"
    copies = ranks // math.gcd(ranks, k_BTKD.shape[2])
    if copies > 1:
        k_BTKD, v_BTKD = (x.repeat_interleave(copies, dim=2) for x in (k_BTKD, v_BTKD))
    # One message carries all three: dim 2 becomes (N, a rank's share of the heads), and what goes to one rank lies together.
    by_rank = [x.unflatten(2, (ranks, -1)) for x in (q_BTHD, k_BTKD, v_BTKD)]
    sent_NBTXD = torch.cat(by_rank, dim=3).permute(2, 0, 1, 3, 4)
    whole_BSXD = _swap(sent_NBTXD, group).permute(1, 0, 2, 3, 4).flatten(1, 2)
    q_BSXD, k_BSXD, v_BSXD = whole_BSXD.split([x.shape[3] for x in by_rank], dim=2)
    own_sinks = None if sinks is None else sinks.chunk(ranks)[group.rank()]
    out_BSXD = attend(q_BSXD, k_BSXD, v_BSXD, documents, scale=scale, window=window, softcap=softcap, sinks=own_sinks)
    sent_NBTXD = out_BSXD.unflatten(1, (ranks, -1)).permute(1, 0, 2, 3, 4)
    return _swap(sent_NBTXD, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _swap(sent: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Row n goes to rank n of the group; row n of the result came from rank n. Differentiable."""
    flat = sent.contiguous().flatten(0, 1)
    return all_to_all_single_autograd(flat, None, None, group).unflatten(0, sent.shape[:2])
