"""Cross-entropy of a linear head without its logits (StreamBP's last part, arXiv 2506.03077).

Logits of a chunk of tokens are computed, turned into their own gradient in place and multiplied away before the next
chunk begins, all in the forward pass, so tokens × vocabulary never exists. The backward pass only scales.

Shape legend: T tokens, C tokens of one chunk, D model width, V vocabulary (or the slice of it that this rank holds).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .limits import LOSS_CHUNK

IGNORED = -100  # target of a position that carries no loss; PyTorch's convention
_ALIGNMENT = 64  # columns the row stride of the logits is rounded up to: an odd vocabulary would leave the tensor cores

Merge = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class LossRule:
    """The rule by which logits become a loss.

    softcap  logits become cap · tanh(logit / cap); None: they stay
    z_loss   adds this times the square of each token's log-sum-exp to what is differentiated (PaLM, arXiv 2204.02311, 5),
             and not to the loss that is returned: losses stay comparable
    ignored  target of positions that count nothing
    """

    softcap: float | None = None
    z_loss: float = 0.0
    ignored: int = IGNORED


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    head_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk: int = LOSS_CHUNK,
    ignored: int = IGNORED,
) -> torch.Tensor:
    """Sum over tokens of −log softmax(hidden · headᵀ)[target], a scalar; positions whose target is `ignored` count nothing.

    softcap, z_loss: see `LossRule`. Gradients to hidden and head are exact. Matmuls run in the inputs' common dtype; softmax,
    loss and the sum of the head's gradient over chunks are fp32 (fp64 for fp64 inputs), and so is the result. A target outside
    [0, V) that isn't `ignored` makes the loss infinite.
    """
    rule = LossRule(softcap, z_loss, ignored)
    return sliced_cross_entropy(hidden_TD, head_VD, targets_T, None, chunk=chunk, rule=rule)


def sliced_cross_entropy(
    hidden_TD: torch.Tensor,
    head_VD: torch.Tensor,
    targets_T: torch.Tensor,
    merge: Merge | None,
    *,
    first: int = 0,
    chunk: int = LOSS_CHUNK,
    rule: LossRule = LossRule(),
) -> torch.Tensor:
    """`linear_cross_entropy` where head_VD are the rows [first, first + V) of a larger head.

    merge takes each row's log-sum-exp and target logit over this slice (−inf where the target lies in another) and returns
    those over the whole vocabulary. The loss is then the whole one; hidden's gradient is this slice's part of the sum.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least one token, not {chunk}")
    assert hidden_TD.dtype == head_VD.dtype, f"hidden is {hidden_TD.dtype}, head {head_VD.dtype}"
    total: Any = _LinearCrossEntropy.apply(hidden_TD, head_VD, targets_T, merge, first, chunk, rule, torch.is_grad_enabled())
    return total


def _plain_softmax(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, merge: Merge | None, first: int, rule: LossRule, differentiate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_softmax` in torch's own operations: one exponential an element, in the logits' place where they are wide enough."""
    rows_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    bent_CV = None
    if rule.softcap is not None:
        bent_CV = (rows_CV / rule.softcap).tanh_()
        rows_CV = rule.softcap * bent_CV
    columns_C = targets_C - first
    inside_C = (columns_C >= 0) & (columns_C < rows_CV.shape[1])
    columns_C1 = torch.where(inside_C, columns_C, 0).unsqueeze(1)
    picked_C = torch.where(inside_C, rows_CV.gather(1, columns_C1).squeeze(1), -torch.inf)
    if not differentiate:
        log_sum_C = rows_CV.logsumexp(1)
        return (log_sum_C, picked_C) if merge is None else merge(log_sum_C, picked_C)
    most_C = rows_CV.amax(1)
    powers_CV = rows_CV.sub_(most_C.unsqueeze(1)).exp_()
    log_sum_C = most_C + powers_CV.sum(1).log()
    if merge is not None:
        log_sum_C, picked_C = merge(log_sum_C, picked_C)
    # The gradient of the summed loss: softmax − one-hot, zero where not valid; of z-loss another 2 · z · log-sum-exp · softmax.
    valid_C = targets_C != rule.ignored
    shares_C = (most_C - log_sum_C).exp()
    if rule.z_loss:
        shares_C = shares_C * (1 + 2 * rule.z_loss * log_sum_C)
    powers_CV.mul_(torch.where(valid_C, shares_C, 0).unsqueeze(1))
    powers_CV.scatter_add_(1, columns_C1, -(inside_C & valid_C).to(powers_CV.dtype).unsqueeze(1))
    if bent_CV is not None:
        powers_CV.mul_(1 - bent_CV.square_())
    if powers_CV is not logits_CV:
        logits_CV.copy_(powers_CV)
    return log_sum_C, picked_C


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton(tensor: torch.Tensor) -> bool:
    """Return whether our Triton kernels can compute with a tensor: on a GPU, with Triton installed, in up to fp32."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and _has_triton()


def _softmax(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, merge: Merge | None, first: int, rule: LossRule, differentiate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's log-sum-exp and target logit over the whole vocabulary. Turns logits into their gradient on request."""
    if runs_triton(logits_CV):
        from .triton_loss import softmax_rows

        at_once = differentiate and merge is None
        compute = functools.partial(softmax_rows, softcap=rule.softcap, z_loss=rule.z_loss)
        log_sum_C, picked_C = compute(logits_CV, targets_C, first, rule.ignored, differentiate=at_once)
        if merge is not None:
            log_sum_C, picked_C = merge(log_sum_C, picked_C)
            if differentiate:
                compute(logits_CV, targets_C, first, rule.ignored, log_sum_C=log_sum_C)
        return log_sum_C, picked_C
    return _plain_softmax(logits_CV, targets_C, merge, first, rule, differentiate)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        head_VD: torch.Tensor,
        targets_T: torch.Tensor,
        merge: Merge | None,
        first: int,
        chunk: int,
        rule: LossRule,
        recording: bool,
    ) -> torch.Tensor:
        tokens, vocabulary = hidden_TD.shape[0], head_VD.shape[0]
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        to_hidden, to_head = (recording and needed for needed in ctx.needs_input_grad[:2])
        hidden_grad_TD = torch.empty_like(hidden_TD) if to_hidden else None
        head_grad_VD = torch.zeros_like(head_VD, dtype=wide) if to_head else None
        differentiate = hidden_grad_TD is not None or head_grad_VD is not None
        stride = -(-vocabulary // _ALIGNMENT) * _ALIGNMENT
        padded = hidden_TD.new_empty(min(chunk, tokens), stride)
        padded[:, vocabulary:] = 0  # oneDNN's bf16 products on CPUs with AMX read it, and 0 times a NaN is one
        buffer = padded[:, :vocabulary]
        total = hidden_TD.new_zeros((), dtype=wide)
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            hidden_CD, targets_C = hidden_TD[part], targets_T[part]
            logits_CV = torch.mm(hidden_CD, head_VD.t(), out=buffer[: hidden_CD.shape[0]])
            log_sum_C, picked_C = _softmax(logits_CV, targets_C, merge, first, rule, differentiate)
            total += torch.where(targets_C != rule.ignored, log_sum_C - picked_C, 0).sum()
            if hidden_grad_TD is not None:
                torch.mm(logits_CV, head_VD, out=hidden_grad_TD[part])
            if head_grad_VD is not None:
                _accumulate(head_grad_VD, logits_CV.t(), hidden_CD)
        ctx.save_for_backward(hidden_grad_TD, head_grad_VD)
        ctx.dtype = hidden_TD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved_tensors = (None if saved is None else _scaled(saved, gradient, ctx.dtype) for saved in ctx.saved_tensors)
        return *saved_tensors, *[None] * 6


def _scaled(saved: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if runs_triton(saved):
        from .triton_loss import scaled

        return scaled(saved, factor, dtype)
    # one element, not none: a 0-dim factor would be rounded to the gradient's dtype before it multiplies
    return torch.mul(saved, factor.view(1), out=torch.empty_like(saved, dtype=dtype))


def _accumulate(sum_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor) -> None:
    """sum += a · b, without rounding the product to the factors' dtype where the device can add it in the sum's."""
    if sum_MN.dtype == a_MK.dtype:
        sum_MN.addmm_(a_MK, b_KN)
    elif sum_MN.is_cuda:
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=sum_MN.dtype, out=sum_MN)
    else:
        sum_MN += a_MK @ b_KN
