"""Cross-entropy with the head's rows spread over the tensor-parallel ranks: `kernels/loss.py`, one vocabulary slice each.

Each rank computes its slice's logits of a chunk of tokens; the ranks exchange two numbers per token (log-sum-exp and
target logit over their slices, one all-gather per chunk) and never a logit. Any vocabulary does: slices may differ in
length, as nothing is padded nothing has to be masked.

Shape legend: T tokens, C tokens of one chunk, D model width, V vocabulary, P tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ...kernels.limits import LOSS_CHUNK
from ...kernels.loss import IGNORED, LossRule, Merge, sliced_cross_entropy

_gather_rows: Callable[..., torch.Tensor] = getattr(funcol, "all_gather_single", None) or getattr(funcol, "all_gather_tensor")  # noqa: B009
"""All-gather as a functional collective. Its name differs between torch 2.11 and 2.13, which warns of the old one."""


def merge_over(group: dist.ProcessGroup) -> Merge:
    """Return the `merge` of `sliced_cross_entropy`: from per-slice statistics of C rows to those over the vocabulary."""

    def merge(log_sum_C: torch.Tensor, picked_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mine_12C = torch.stack((log_sum_C, picked_C))[None]
        all_P2C = funcol.wait_tensor(_gather_rows(mine_12C, 0, group))
        log_sums_PC, picked_PC = all_P2C.unbind(1)
        return log_sums_PC.logsumexp(0), picked_PC.amax(0)

    return merge


class VocabularyParallelLoss:
    """The model's `token_loss` seam over a 1-D device mesh. The same total on every rank."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._merge = merge_over(mesh.get_group())

    def __call__(
        self,
        hidden_TD: torch.Tensor,
        head_VD: torch.Tensor,
        targets_T: torch.Tensor,
        *,
        softcap: float | None = None,
        z_loss: float = 0.0,
        chunk: int = LOSS_CHUNK,
        ignored: int = IGNORED,
    ) -> torch.Tensor:
        """Sum of token losses, as `models.loss.linear_cross_entropy` of the whole head.

        hidden_TD: a replicated DTensor; its gradient is a partial sum, reduced wherever DTensor needs it whole.
        head_VD: a DTensor sharded by rows; its gradient is sharded alike. targets_T: plain, the same on every rank.
        """
        assert isinstance(hidden_TD, DTensor) and hidden_TD.placements == (Replicate(),), "hidden must be replicated"
        assert isinstance(head_VD, DTensor) and head_VD.placements == (Shard(0),), "the head must be sharded by rows"
        rows_VD = head_VD.to_local()
        rows = -(-head_VD.shape[0] // self._mesh.size())  # DTensor's cut: equal slices, the last ones shorter
        return sliced_cross_entropy(
            hidden_TD.to_local(grad_placements=[Partial()]),
            rows_VD,
            targets_T,
            self._merge,
            first=self._mesh.get_local_rank() * rows,
            chunk=chunk,
            rule=LossRule(softcap, z_loss, ignored),
        )
