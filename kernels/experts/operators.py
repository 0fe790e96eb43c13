"""The operators of routed experts: from tokens to weighted sums of expert outputs, without a copy of a token for each expert.

Between forward and backward pass only the tokens and the outputs of gate and up are kept: an expert's output is not, because
the gradient of its weight is taken inside the backward product with w2. The structure of the products is SonicMoE's
(arXiv 2512.14080). `torch.compile` does not trace the operators. They compute by `hopper.py` on a GPU and by `plain.py`
elsewhere.

Shape legend: T tokens, K experts of a token, N = T·K rows sorted by expert, E experts, D model width, F an expert's width.
token_N: the token of each sorted row. place_TK: the sorted row of each of a token's choices. bounds_E1: an expert's first row
and, at the end, the number of rows. All three int32.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from ..swiglu import apart, in_turns
from . import hopper, plain
from .gather_sum import gather_sum


def _products(tensor: torch.Tensor) -> ModuleType:
    return hopper if tensor.is_cuda else plain


def _both(w1: torch.Tensor, w3: torch.Tensor, bounds_E1: torch.Tensor) -> torch.Tensor:
    """Return gate and up of each expert with their rows in turns: (E, 2F, D)."""
    return in_turns(w1, w3).unflatten(0, (len(bounds_E1) - 1, -1))


@torch.library.custom_op("meshloom::experts_up", mutates_args=())
def experts_up(
    x_TD: torch.Tensor,
    w1: torch.Tensor,
    w3: torch.Tensor,
    token_N: torch.Tensor,
    place_TK: torch.Tensor,
    bounds_E1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute each row's silu(gate) · up (N, F), without a gradient, and gate and up in turns (N, 2F), which carry it.

    w1, w3: (E·F, D).
    """
    return _products(x_TD).gated(x_TD, _both(w1, w3, bounds_E1), token_N, bounds_E1)


@torch.library.custom_op("meshloom::experts_up_backward", mutates_args=())
def experts_up_backward(
    dboth_N2F: torch.Tensor,
    x_TD: torch.Tensor,
    w1: torch.Tensor,
    w3: torch.Tensor,
    token_N: torch.Tensor,
    place_TK: torch.Tensor,
    bounds_E1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of x, w1 and w3."""
    products = _products(x_TD)
    both_E2FD = _both(w1, w3, bounds_E1)
    dx_TD = gather_sum(products.rows(dboth_N2F, both_E2FD, bounds_E1), place_TK)
    gradient_E2FD = torch.empty_like(both_E2FD)
    products.weights(x_TD, dboth_N2F, token_N, bounds_E1, gradient_E2FD.mT)
    return dx_TD, *apart(gradient_E2FD.flatten(0, 1))


@torch.library.custom_op("meshloom::experts_down", mutates_args=())
def experts_down(
    hidden_NF: torch.Tensor,
    both_N2F: torch.Tensor,
    w2: torch.Tensor,
    gates_TK: torch.Tensor,
    token_N: torch.Tensor,
    place_TK: torch.Tensor,
    bounds_E1: torch.Tensor,
) -> torch.Tensor:
    """Compute Σ_k gates[t, k] · w2 hidden[place[t, k]]: (T, D).

    The gradient goes to `both_N2F`, from which hidden was computed. w2: (E·D, F). gates_TK: in at least fp32, as is the sum.
    """
    w_EDF = w2.unflatten(0, (len(bounds_E1) - 1, -1))
    return gather_sum(_products(w2).rows(hidden_NF, w_EDF.mT, bounds_E1), place_TK, gates_TK)


@torch.library.custom_op("meshloom::experts_down_backward", mutates_args=())
def experts_down_backward(
    dy_TD: torch.Tensor,
    both_N2F: torch.Tensor,
    w2: torch.Tensor,
    gates_TK: torch.Tensor,
    token_N: torch.Tensor,
    place_TK: torch.Tensor,
    bounds_E1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of gate and up in turns, of w2, and of the gates."""
    products = _products(w2)
    dy_TD, w_EDF = dy_TD.contiguous(), w2.unflatten(0, (len(bounds_E1) - 1, -1))
    gate_N = torch.empty_like(gates_TK).flatten()
    gate_N[place_TK.flatten()] = gates_TK.flatten()
    dboth_N2F, hidden_NF, dgate_N = products.gated_backward(dy_TD, w_EDF, both_N2F, gate_N, token_N, bounds_E1)
    gradient_EDF = torch.empty_like(w_EDF)
    products.weights(dy_TD, hidden_NF, token_N, bounds_E1, gradient_EDF)
    return dboth_N2F, gradient_EDF.flatten(0, 1), dgate_N[place_TK]


@experts_up.register_fake
def _(
    x: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor, token: torch.Tensor, place: torch.Tensor, bounds: torch.Tensor
) -> Any:
    rows, width = token.shape[0], w1.shape[0] // (bounds.shape[0] - 1)
    return x.new_empty(rows, width), x.new_empty(rows, 2 * width)


@experts_up_backward.register_fake
def _(dboth: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor, *_rest: torch.Tensor) -> Any:
    return x.new_empty(x.shape), w1.new_empty(w1.shape), w3.new_empty(w3.shape)


@experts_down.register_fake
def _(
    hidden: torch.Tensor,
    both: torch.Tensor,
    w2: torch.Tensor,
    gates: torch.Tensor,
    token: torch.Tensor,
    place: torch.Tensor,
    bounds: torch.Tensor,
) -> torch.Tensor:
    return hidden.new_empty(place.shape[0], w2.shape[0] // (bounds.shape[0] - 1))


@experts_down_backward.register_fake
def _(dy: torch.Tensor, both: torch.Tensor, w2: torch.Tensor, gates: torch.Tensor, *_rest: torch.Tensor) -> Any:
    return both.new_empty(both.shape), w2.new_empty(w2.shape), gates.new_empty(gates.shape)


def _keep_up(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)  # of the first output: there is none


def _differentiate_up(ctx: Any, _dhidden: None, dboth: torch.Tensor) -> Any:
    return *experts_up_backward(dboth, *ctx.saved_tensors), None, None, None


def _keep_down(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_down(ctx: Any, dy: torch.Tensor) -> Any:
    return None, *experts_down_backward(dy, *ctx.saved_tensors), None, None, None


experts_up.register_autograd(_differentiate_up, setup_context=_keep_up)
experts_down.register_autograd(_differentiate_down, setup_context=_keep_down)
