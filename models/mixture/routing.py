"""Routing: from logits to scores, from scores to each token's experts and gates. Pure functions.

Shape legend: T tokens, E experts, K chosen experts of a token, G groups of experts.
"""

from __future__ import annotations

import torch

TINY = 1e-20  # keeps a sum of scores that have all underflown from dividing by zero


def scores_of(logits_TE: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the scores of experts: softmax over them, or the sigmoid of each."""
    return logits_TE.softmax(-1) if kind == "softmax" else logits_TE.sigmoid()


@torch.library.custom_op("meshloom::choose_experts", mutates_args=())
def choose_experts(
    scores_TE: torch.Tensor, bias_E: torch.Tensor | None, top_k: int, groups: int, top_groups: int
) -> torch.Tensor:
    """Choose each token's `top_k` experts by score plus bias: (T, K) int64.

    With groups, a token first chooses `top_groups` of them by the sum of their two best scores (DeepSeek-V3, arXiv
    2412.19437). It is an operator so that activation policies can keep its result: chosen again, from scores that another
    kernel has rounded, a token's experts might be others.
    """
    ranked_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if top_groups < groups:
        ranked_TGE = ranked_TE.unflatten(-1, (groups, -1))
        best_TG = ranked_TGE.topk(min(2, ranked_TGE.shape[-1]), dim=-1).values.sum(-1)
        chosen_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(1, best_TG.topk(top_groups, dim=-1).indices, True)
        ranked_TE = ranked_TGE.masked_fill(~chosen_TG[..., None], -torch.inf).flatten(1)
    return ranked_TE.topk(top_k, dim=-1).indices


@choose_experts.register_fake
def _(scores_TE: torch.Tensor, bias_E: torch.Tensor | None, top_k: int, groups: int, top_groups: int) -> torch.Tensor:
    return scores_TE.new_empty((scores_TE.shape[0], top_k), dtype=torch.int64)


@torch.library.custom_op("meshloom::choose_active", mutates_args=())
def choose_active(active_TE: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's `most` largest activations: their experts (T, K) int64, and which of them are above zero.

    One operator, for the reason of `choose_experts`: which choices are taken must not change where a block is computed again.
    """
    largest_TK, choice_TK = active_TE.topk(most, dim=-1)
    return choice_TK, largest_TK > 0


@choose_active.register_fake
def _(active_TE: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (active_TE.shape[0], most)
    return active_TE.new_empty(shape, dtype=torch.int64), active_TE.new_empty(shape, dtype=torch.bool)


def gates_of(scores_TE: torch.Tensor, choice_TK: torch.Tensor, *, renormalise: bool, scale: float) -> torch.Tensor:
    """Return the weights of the chosen experts' outputs: their scores, renormalised if asked for, times `scale`."""
    gates_TK = scores_TE.gather(1, choice_TK)
    if renormalise:
        gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + TINY)
    return gates_TK if scale == 1.0 else gates_TK * scale
