"""Log-likelihoods of continuations under a whole model, in batches of rows of like length.

Shape legend: B rows, S positions, V vocabulary, C positions that are scored.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...models.protocol import Model

_LOGITS = 1 << 30  # bytes of a pass' logits, at most
_POSITIONS = 1 << 14  # of a pass, at most: more makes no GPU faster


@dataclass(frozen=True)
class Continuation:
    """Tokens to be scored behind others. context: at least one token."""

    context: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Score:
    """The log-likelihood of a continuation, in nats. greedy: whether each of its tokens is the likeliest one."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class _Row:
    """Tokens that the model reads, and the continuations that are scored at the last of its positions."""

    tokens: tuple[int, ...]
    numbers: list[int]


class LongerThanContext(ValueError):
    """A task asks for more tokens than the model's context has."""


def refuse_longer(request: Continuation, context: int) -> None:
    """Raise LongerThanContext for a continuation that the model can't read whole."""
    if len(request.tokens) > context:
        raise LongerThanContext(f"a continuation of {len(request.tokens)} tokens is longer than the context of {context}")


def deal_by_cost(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Deal pieces of work to ranks: each, in order, to the rank with the least. Returns the numbers of each rank's.

    costs: largest first, so that no rank has more than 4/3 of the least possible (Graham, 1969)
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for number, cost in enumerate(costs):
        load, rank = loads[0]
        dealt[rank].append(number)
        heapq.heapreplace(loads, (load + cost, rank))
    return dealt


def passes_of(requests: Sequence[Continuation], context: int, positions: int, ranks: int = 1) -> list[list[_Row]]:
    """Order requests into passes of like length, longest first. Requests that read the same tokens share a row.

    context    tokens that the model reads at most: of longer requests the beginning is left out
    positions  of a pass, padding included, unless one row has more
    ranks      that share the passes: none has more than a rank's part of all positions, unless one row has more

    Raises LongerThanContext.
    """
    numbers: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        assert request.context, "a continuation is scored behind at least one token"
        refuse_longer(request, context)
        numbers[(*request.context, *request.tokens)[:-1][-context:]].append(number)
    rows = sorted((_Row(tokens, found) for tokens, found in numbers.items()), key=lambda row: -len(row.tokens))
    passes: list[list[_Row]] = []
    positions = min(positions, -(-sum(len(row.tokens) for row in rows) // ranks))
    for row in rows:
        if not passes or len(passes[-1][0].tokens) * (len(passes[-1]) + 1) > positions:
            passes.append([])
        passes[-1].append(row)
    return passes


@torch.no_grad()
def score(
    model: nn.Module, requests: Sequence[Continuation], context: int, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[int, Score]]:
    """Score one rank's part of the requests: yield each request's number with its score.

    Rows are padded behind their end, which a causal model does not see. Log-likelihoods are taken in at least fp32.
    Raises LongerThanContext.
    """
    weight = next(model.parameters())
    passes = passes_of(requests, context, _positions(model), ranks)
    dealt = deal_by_cost([len(rows) * len(rows[0].tokens) for rows in passes], ranks)
    for rows in (passes[number] for number in dealt[rank]):
        longest = len(rows[0].tokens)
        padded = [[*row.tokens, *[0] * (longest - len(row.tokens))] for row in rows]
        logits_BSV = model(torch.tensor(padded, device=weight.device))
        scored = [(at, number) for at, row in enumerate(rows) for number in row.numbers]
        places, targets = list[int](), list[int]()
        for at, number in scored:
            tokens, end = requests[number].tokens, at * longest + len(rows[at].tokens)
            places += range(end - len(tokens), end)
            targets += tokens
        sizes = [len(requests[number].tokens) for _, number in scored]
        found = (values.split(sizes) for values in _scores_of_tokens(logits_BSV, places, targets))
        for (_, number), likelihoods_C, likeliest_C in zip(scored, *found, strict=True):
            yield number, Score(float(likelihoods_C.sum()), bool(likeliest_C.all()))


def _scores_of_tokens(logits_BSV: torch.Tensor, places: list[int], targets: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-likelihood of each target (C,), fp64, and whether it is the likeliest token, on the host."""
    device = logits_BSV.device
    logits_CV = logits_BSV.flatten(0, 1)[torch.tensor(places, dtype=torch.int64, device=device)]
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    targets_C = torch.tensor(targets, dtype=torch.int64, device=device)
    of_target_C = logits_CV.gather(1, targets_C[:, None])[:, 0]
    likelihoods_C = of_target_C - logits_CV.logsumexp(1)
    return likelihoods_C.double().cpu(), (logits_CV.argmax(1) == targets_C).cpu()


def _positions(model: nn.Module) -> int:
    """Return how many positions a pass may have. One row a pass where tokens of other rows would change a row's result."""
    shape = model.decoder_config if isinstance(model, Model) else None
    if shape is None:
        return _POSITIONS >> 2
    if shape.mixture_layers() and shape.experts.capacity is not None:
        return 1
    size = next(model.parameters()).element_size()
    return min(_POSITIONS, max(1, _LOGITS // (shape.known_vocabulary * size)))
