"""Dispatch: tokens sorted by expert, and back. Where every rank has all experts nothing travels.

Shape legend: T tokens, K experts of a token, N = T·K assignments, E experts, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Assignment:
    """The assignments of tokens to experts, sorted by expert; those of one expert in the order of tokens.

    order_N     index of the assignment in (T, K), flattened, at each sorted place; dropped ones are last
    inverse_TK  sorted place of each assignment
    counts_E    assignments that each expert takes, int64, on the device
    kept_TK     which assignments are taken; None: all are
    """

    order_N: torch.Tensor
    inverse_TK: torch.Tensor
    counts_E: torch.Tensor
    kept_TK: torch.Tensor | None = None


def sort_by_expert(
    choice_TK: torch.Tensor,
    experts: int,
    capacity: float | None = None,
    counted_T: torch.Tensor | None = None,
    taken_TK: torch.Tensor | None = None,
) -> Assignment:
    """Sort assignments by expert, without waiting for the device.

    capacity: an expert takes the first ⌈capacity · T·K / E⌉ assignments, in the order of tokens; None: all of them.
    counted_T: tokens that count take their places before all others, such as padding; None: all count.
    taken_TK: which of the choices are assignments at all; None: all are. The others take no expert's room.
    """
    keys_N = choice_TK.flatten()
    if taken_TK is not None:
        keys_N = keys_N.masked_fill(~taken_TK.flatten(), experts)
    sorted_N, order_N = narrow(keys_N, experts).sort(stable=True)
    counts_E = count_sorted(sorted_N, experts)
    kept_TK = taken_TK
    if capacity is not None:
        most = math.ceil(capacity * len(keys_N) / experts)
        if counted_T is not None:
            last_N = (~counted_T)[:, None].expand_as(choice_TK).flatten()
            order_N = (2 * keys_N + last_N).argsort(stable=True)
        sorted_N = keys_N[order_N]
        begins_E = F.pad(counts_E.cumsum(0), (1, 0))  # the last is that of choices which are not taken
        places_N = torch.arange(len(keys_N), device=keys_N.device)
        taken_N = torch.empty_like(keys_N, dtype=torch.bool)
        taken_N[order_N] = (places_N - begins_E[sorted_N] < most) & (sorted_N < experts)
        kept_TK = taken_N.view_as(choice_TK)
        order_N = keys_N.masked_fill(~taken_N, experts).argsort(stable=True)
        counts_E = counts_E.clamp(max=most)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return Assignment(order_N, inverse_N.view_as(choice_TK), counts_E, kept_TK)


def count_sorted(sorted_N: torch.Tensor, size: int) -> torch.Tensor:
    """Count the keys 0 to size − 1 in a sorted list: (size,) int64.

    `torch.bincount` would wait for the device, and additions to so few places would wait for one another.
    """
    return torch.searchsorted(sorted_N, torch.arange(size + 1, dtype=sorted_N.dtype, device=sorted_N.device)).diff()


def narrow(keys_N: torch.Tensor, most: int) -> torch.Tensor:
    """Return keys of 0 to `most` as int16 where they fit, which takes a quarter of the passes of sorting int64."""
    return keys_N.to(torch.int16) if most <= torch.iinfo(torch.int16).max else keys_N


@torch.library.custom_op("meshloom::gather_assignments", mutates_args=())
def gather_assignments(x_TD: torch.Tensor, order_N: torch.Tensor, inverse_TK: torch.Tensor) -> torch.Tensor:
    """Gather each assignment's token: (N, D). Its gradient is gathered and summed over K: no atomics, the same every time."""
    return x_TD[order_N // inverse_TK.shape[1]]


@torch.library.custom_op("meshloom::gather_outputs", mutates_args=())
def gather_outputs(rows_ND: torch.Tensor, order_N: torch.Tensor, inverse_TK: torch.Tensor) -> torch.Tensor:
    """Gather the rows of each token's assignments: (T, K, D). The gradient is the opposite gather."""
    return rows_ND[inverse_TK]


@gather_assignments.register_fake
def _(x_TD: torch.Tensor, order_N: torch.Tensor, inverse_TK: torch.Tensor) -> torch.Tensor:
    return x_TD.new_empty((order_N.shape[0], x_TD.shape[1]))


@gather_outputs.register_fake
def _(rows_ND: torch.Tensor, order_N: torch.Tensor, inverse_TK: torch.Tensor) -> torch.Tensor:
    return rows_ND.new_empty((*inverse_TK.shape, rows_ND.shape[1]))


def _save_indices(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _assignments_backward(ctx: Any, grad_ND: torch.Tensor) -> Any:
    _, inverse_TK = ctx.saved_tensors
    wide = torch.promote_types(grad_ND.dtype, torch.float32)
    return grad_ND[inverse_TK].sum(1, dtype=wide).to(grad_ND.dtype), None, None


def _outputs_backward(ctx: Any, grad_TKD: torch.Tensor) -> Any:
    order_N, _ = ctx.saved_tensors
    return grad_TKD.flatten(0, 1)[order_N], None, None


gather_assignments.register_autograd(_assignments_backward, setup_context=_save_indices)
gather_outputs.register_autograd(_outputs_backward, setup_context=_save_indices)


class Journey(Protocol):
    """The way of one micro-batch's tokens to the experts that they chose, wherever these are, and back."""

    def send(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of the experts here, sorted by expert, and each one's number of rows (int64, on the device)."""
        ...

    def back(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """Return the experts' outputs at the tokens that sent for them: (T, K, D), zero where an assignment was dropped."""
        ...


Dispatch = Callable[[Assignment], Journey]
"""Begins the way of an assignment's tokens. What is done before `Journey.send` may hide what it waits for."""

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From the outputs of each token's experts (T, K, D) and their gates (T, K) to the token's (T, D), in the outputs' dtype."""


class LocalJourney:
    """Every expert is here. Implements `Journey`."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment

    def send(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sort the tokens by expert."""
        assignment = self._assignment
        rows_ND = gather_assignments(x_TD, assignment.order_N, assignment.inverse_TK)
        if assignment.kept_TK is not None:
            rows_ND = torch.where(_taken(assignment), rows_ND, 0)  # a product may leave garbage in a dropped row's gradient
        return rows_ND, assignment.counts_E

    def back(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """Sort the outputs by token."""
        assignment = self._assignment
        if assignment.kept_TK is not None:
            rows_ND = torch.where(_taken(assignment), rows_ND, 0)
        return gather_outputs(rows_ND, assignment.order_N, assignment.inverse_TK)


def _taken(assignment: Assignment) -> torch.Tensor:
    """Return which sorted rows an expert takes: (N, 1). Dropped ones are last."""
    places_N = torch.arange(len(assignment.order_N), device=assignment.order_N.device)
    return (places_N < assignment.counts_E.sum())[:, None]


def combine(y_TKD: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
    """Sum a token's expert outputs times its gates, in the gates' precision: (T, D), in the outputs' dtype."""
    return (y_TKD.to(gates_TK.dtype) * gates_TK[..., None]).sum(1).to(y_TKD.dtype)
