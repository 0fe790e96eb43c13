"""Expert parallelism: each rank of a group holds other experts, and tokens travel to those that they chose, and back.

A micro-batch takes three exchanges: how many rows each expert will get, the rows, and the experts' outputs. How many rows
arrive is known to the host only after the first. The mixture computes its shared experts before it waits for that number.

A backward pass sends the gradients the same ways back. All ranks of a group take part in every exchange, also those that send
or get no row, so none can be missing.

Shape legend: R ranks of the group, E experts, L = E / R experts of one rank, T tokens, K experts of a token, N = T·K
assignments, M rows that arrive here, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from ...models.mixture.dispatch import Assignment, Dispatch, Journey, gather_assignments, gather_outputs
from ...models.mixture.mixture import mixtures_of
from ...models.protocol import Model

P = ParamSpec("P")
R = TypeVar("R")


def spread_experts(stage: Model, ep: DeviceMesh) -> Collection[nn.Module]:
    """Leave each rank its own experts of every mixture in a stage, in place, and have tokens travel to them.

    ep: a 1-D mesh whose size divides the number of experts. Returns the modules whose weights are now divided.
    """
    found: list[nn.Module] = []
    for mixture in mixtures_of(stage).values():
        count = mixture.experts.count // ep.size()
        first = ep.get_local_rank() * count
        mixture.experts.keep(range(first, first + count))
        mixture.dispatch, mixture.sends_tokens = _exchange_in(ep.get_group()), True
        found.append(mixture.experts)
    return found


def _uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Have compilers leave a function alone: the sizes in it depend on numbers that they can't see."""
    return cast(Callable[P, R], torch.compiler.disable(function))


def _exchange_in(group: dist.ProcessGroup) -> Dispatch:
    """Make a mixture's dispatch."""

    @_uncompiled
    def begin(assignment: Assignment) -> Journey:
        return ExchangedJourney(group, assignment)

    return begin


class ExchangedJourney:
    """Rows go to the ranks of their experts, and outputs come back. Implements `Journey`."""

    def __init__(self, group: dist.ProcessGroup, assignment: Assignment) -> None:
        """Start to tell every rank of the group how many rows its experts will get. Every one of them must call it."""
        self._group, self._assignment = group, assignment
        sent_RL = assignment.counts_E.view(group.size(), -1)
        self._arriving_RL = all_to_all_single(sent_RL, None, None, group)
        self._read_rows = _copy_to_host(torch.stack([sent_RL.sum(1), self._arriving_RL.sum(1)]))

    @_uncompiled
    def send(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Send each token to its experts, and sort those that arrive by expert. The host waits for their number."""
        self._sent, self._arriving = self._read_rows()
        order_N, inverse_TK = self._assignment.order_N, self._assignment.inverse_TK
        rows_ND = gather_assignments(x_TD, order_N, inverse_TK)
        if self._assignment.kept_TK is not None:
            rows_ND = rows_ND[: sum(self._sent)]  # dropped ones are last
        arrived_MD = all_to_all_single_autograd(rows_ND, self._arriving, self._sent, self._group)
        # They lie by rank, and within a rank by expert.
        ranks, experts = self._arriving_RL.shape
        device, size = arrived_MD.device, sum(self._arriving)
        expert_RL = torch.arange(experts, device=device).repeat(ranks)
        expert_M = expert_RL.repeat_interleave(self._arriving_RL.flatten(), output_size=size)
        self._order_M = expert_M.argsort(stable=True)
        self._inverse_M = torch.empty_like(self._order_M)
        self._inverse_M[self._order_M] = torch.arange(size, device=device)
        rows_MD = gather_assignments(arrived_MD, self._order_M, self._inverse_M[:, None])
        return rows_MD, self._arriving_RL.sum(0)

    @_uncompiled
    def back(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """Send the outputs back to their tokens."""
        order_N, inverse_TK = self._assignment.order_N, self._assignment.inverse_TK
        leaving_MD = gather_assignments(rows_ND, self._inverse_M, self._order_M[:, None])
        returned_ND = all_to_all_single_autograd(leaving_MD, self._sent, self._arriving, self._group)
        if self._assignment.kept_TK is not None:
            returned_ND = F.pad(returned_ND, (0, 0, 0, len(order_N) - len(returned_ND)))
        return gather_outputs(returned_ND, order_N, inverse_TK)


def _copy_to_host(rows_2R: torch.Tensor) -> Callable[[], list[list[int]]]:
    """Start to copy numbers to the host. Returns what waits for them, and for nothing that was started since."""
    host_2R = rows_2R.to("cpu", non_blocking=True)
    if not rows_2R.is_cuda:
        return host_2R.tolist
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[list[int]]:
        copied.synchronize()
        return host_2R.tolist()

    return read
