"""Judge a step's loss and gradient norm on the device, by a robust statistic of the steps before.

The statistic is the median of the last accepted steps, and their median absolute deviation (MAD) as a measure of spread. A step
that is not accepted leaves no trace in it. So one outlier can't hide the next one, nor make ordinary steps look bad.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...parallel.mesh import Mesh

WINDOW = 128
"""Accepted steps that the statistic is made of."""
WARM_UP = 64
"""Accepted steps before the first one can be called a spike."""
MAD_TO_SIGMA = 1.4826
"""The standard deviation of normal numbers whose MAD is 1."""
LEAST_OF_LOSS = 0.02
"""Least sigma of the loss, as a share of its median: smaller moves harm nobody."""
LEAST_OF_NORM = 0.3
"""Least sigma of the gradient norm's logarithm: six are a norm of six times the median. Clipping bounds what is below."""

NOT_FINITE, LOSS_SPIKE, NORM_SPIKE = 1, 2, 4
"""Faults of a step: bits of a verdict's code."""

NUMBERS = ("bad_step", "log_norm", "loss_sigmas", "norm_sigmas", "bad_ranks", "bad_rank_sum")
"""Names of the numbers that a judged step brings to the host."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on a step.

    code                      0, or a sum of NOT_FINITE, LOSS_SPIKE and NORM_SPIKE
    loss_sigmas, norm_sigmas  distance from the median in sigmas; nan before there is one
    bad_ranks, bad_rank_sum   how many ranks had a loss of their own that is not finite, and the sum of their numbers
    """

    code: int
    loss: float
    norm: float
    log_norm: float
    loss_sigmas: float
    norm_sigmas: float
    bad_ranks: int
    bad_rank_sum: int

    @property
    def bad(self) -> bool:
        """True if the step was not accepted."""
        return self.code != 0

    @property
    def finite(self) -> bool:
        """True if loss and gradient norm are finite."""
        return not self.code & NOT_FINITE

    @property
    def rank(self) -> int | None:
        """The rank whose loss is not finite, if there is just one."""
        return self.bad_rank_sum if self.bad_ranks == 1 else None

    @classmethod
    def taken_from(cls, numbers: dict[str, float]) -> Verdict | None:
        """Take a verdict's numbers out of a step's; None for a step that was not judged."""
        if "bad_step" not in numbers:
            return None
        code, log_norm, loss_sigmas, norm_sigmas, ranks, rank_sum = (numbers.pop(name) for name in NUMBERS)
        count = int(ranks)
        return cls(
            int(code),
            numbers["loss"],
            numbers["grad_norm"],
            log_norm,
            loss_sigmas,
            norm_sigmas,
            count,
            int(rank_sum) if count else 0,
        )


class SpikeDetector:
    """The statistic, and a mirror of it on the host that checkpoints save.

    All ranks judge the numbers of rank 0, so that rounding can't let them decide differently.

    skip  fp32, on the device: 1 from a bad step on until `release`. Nothing that follows a bad step is taken before the host
          has seen it; the host is a step late
    """

    def __init__(self, mesh: Mesh, sigmas: float | None) -> None:
        """sigmas: distance from the median at which a step is a spike; None: no finite step is."""
        self._mesh, self._sigmas = mesh, sigmas
        self._window_2W = torch.full((2, WINDOW), torch.nan, dtype=torch.float64, device=mesh.device)
        self._slots_W = torch.arange(WINDOW, device=mesh.device)
        self._accepted = torch.zeros((), dtype=torch.int64, device=mesh.device)
        self._least_2, self._least_share_2, self._bits_2 = self._window_2W.new_tensor(
            [[0.0, LEAST_OF_NORM], [LEAST_OF_LOSS, 0.0], [LOSS_SPIKE, NORM_SPIKE]]
        ).unbind()
        self.skip = torch.zeros((), device=mesh.device)
        self._mirror: list[tuple[float, float]] = []  # loss and log of the norm, by slot
        self._count = 0

    @torch.no_grad()
    def judge(self, loss: torch.Tensor, norm: torch.Tensor, own: torch.Tensor) -> dict[str, torch.Tensor]:
        """Judge a step, set `skip`, and accept the step unless it is bad. Return the numbers for `Verdict.taken_from`.

        loss: mean of the global batch; norm: of the whole gradient; own: this rank's part of the loss. Ranks are named by
        their numbers in the whole run. One collective of four numbers where there are several ranks.
        """
        here = (~own.isfinite()).double()
        values = torch.stack(
            [loss.double(), norm.double().clamp(min=1e-300).log(), here, here * self._mesh.global_rank(self._mesh.rank)]
        )
        if self._mesh.rank:
            values[:2] = 0.0
        self._mesh.sum(values)
        judged_2, ranks_2 = values[:2], values[2:]
        finite = judged_2.isfinite().all()
        code = (~finite).double() * NOT_FINITE
        if self._sigmas is None:
            sigmas_2 = torch.full_like(judged_2, torch.nan)
        else:
            center_2 = self._window_2W.nanmedian(1).values
            spread_2 = (self._window_2W - center_2[:, None]).abs().nanmedian(1).values * MAD_TO_SIGMA
            least_2 = self._least_2 + self._least_share_2 * center_2.abs()
            sigmas_2 = (judged_2 - center_2) / torch.maximum(spread_2, least_2)
            over_2 = (sigmas_2 > self._sigmas) & (self._accepted >= WARM_UP) & finite
            code = code + (over_2 * self._bits_2).sum()
        self.skip = torch.maximum(self.skip, (code > 0).float())
        taken = self.skip == 0
        here_W = (self._slots_W == self._accepted % WINDOW) & taken
        self._window_2W = torch.where(here_W, judged_2[:, None], self._window_2W)
        self._accepted = self._accepted + taken
        return dict(zip(NUMBERS, [code, judged_2[1], *sigmas_2.unbind(), *ranks_2.unbind()], strict=True))

    def release(self) -> None:
        """Let steps be taken again: the host has seen the bad one."""
        self.skip = torch.zeros_like(self.skip)

    def accept(self, verdict: Verdict) -> None:
        """Mirror on the host what the device has accepted."""
        value, slot = (verdict.loss, verdict.log_norm), self._count % WINDOW
        if slot == len(self._mirror):
            self._mirror.append(value)
        else:
            self._mirror[slot] = value
        self._count += 1

    def restart(self) -> None:
        """Forget all steps: a new level has begun, and warms up."""
        self.restart_mirror()
        self.restart_window()

    def restart_mirror(self) -> None:
        """Forget on the host: it comes to the step where a new level begins."""
        self._mirror, self._count = [], 0

    def restart_window(self) -> None:
        """Forget on the device, which is ahead of the host."""
        self._window_2W = torch.full_like(self._window_2W, torch.nan)
        self._accepted = torch.zeros_like(self._accepted)

    def state_dict(self) -> dict[str, Any]:
        """Return the accepted steps that the host knows of, as JSON values. It waits for no device."""
        return {"accepted": self._count, "window": [list(pair) for pair in self._mirror]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.restart()
        self._count, self._mirror = int(state["accepted"]), [(loss, norm) for loss, norm in state["window"]]
        self._accepted = torch.full_like(self._accepted, self._count)
        if self._mirror:
            held = torch.tensor(self._mirror, dtype=torch.float64).T
            self._window_2W[:, : held.shape[1]] = held.to(self._window_2W.device)
