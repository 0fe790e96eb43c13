"""Distance of each way of counting from the balance loss of the global batch: gradients of a router, in float64.

    python benchmarks/balance_gradients.py

A mixture of linear experts learns a task of eight domains, driven by the exact loss. At each step every way's gradient of the
router is computed at the same weights and batch, for each cut of the batch into ranks and passes. Printed are medians over
steps 20 to 80: norm over the exact gradient's, cosine to it, and cosine to the gradient on a large fresh sample. `past`
and `exact` do not depend on the cut, so they have one row each.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from meshloom.models.mixture.charges import share_of

DOMAINS, DIM, EXPERTS, TOP_K, LENGTH = 8, 16, 16, 2, 32
STEPS, FIRST = 80, 20
RATE, COEFFICIENT = 1e-2, 0.05
FRESH = 4096  # sequences of the large sample
GRID = ((1, 4), (1, 16), (8, 1), (8, 4))  # ranks × passes
KEEPS = (0.0, 0.5, 0.8)


class Task:
    """Sequences of eight domains, each with a mean and a linear map of its own."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._means = self._normal(DOMAINS, DIM)
        self._maps = self._normal(DOMAINS, DIM, DIM) / DIM**0.5

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random, dtype=torch.float64)

    def draw(self, sequences: int, *, sorted_by_domain: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw inputs and targets, each (sequences, LENGTH, DIM). sorted_by_domain: a domain's sequences lie together."""
        if sorted_by_domain:
            domain = torch.arange(sequences) * DOMAINS // sequences
        else:
            domain = torch.randint(DOMAINS, (sequences,), generator=self._random)
        x = self._means[domain][:, None] + self._normal(sequences, LENGTH, DIM)
        return x, torch.einsum("bij,bsj->bsi", self._maps[domain], x)


@dataclass
class Weights:
    """The router (E, D) and the experts' maps (E, D, D)."""

    router: torch.Tensor = field(default_factory=lambda: torch.zeros(EXPERTS, DIM, dtype=torch.float64).normal_(0, 0.02))
    experts: torch.Tensor = field(default_factory=lambda: torch.zeros(EXPERTS, DIM, DIM, dtype=torch.float64).normal_(0, 0.1))

    def __post_init__(self) -> None:
        self.router.requires_grad_()
        self.experts.requires_grad_()

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probabilities (B, S, E), and which experts are chosen, as ones (B, S, E)."""
        p = (x @ self.router.T).softmax(-1)
        return p, torch.zeros_like(p).scatter_(-1, p.topk(TOP_K).indices, 1.0)

    def task_loss(self, x: torch.Tensor, y: torch.Tensor, p: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the mean square error; an expert's output is weighted by its probability."""
        out = torch.einsum("bse,eij,bsj->bsi", p * chosen, self.experts, x)
        return (out - y).square().mean()


def prices(counts_BE: torch.Tensor, ranks: int, passes: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the ways whose shares depend on the cut, with each sequence's shares (B, E).

    Rank r runs, in its pass a, the (r · passes + a)-th part of the batch, as data-parallel readers do.
    """
    parts = counts_BE.view(ranks, passes, -1, EXPERTS)
    each = parts.sum(2, keepdim=True)
    synchronised = each.sum(0, keepdim=True).expand_as(each)
    prefix = synchronised.cumsum(1)
    running_mean = prefix / torch.arange(1, passes + 1).view(1, -1, 1, 1) / ranks
    yield "micro-batch", share_of(each).expand_as(parts).reshape_as(counts_BE)
    yield "synchronised over ranks only", share_of(synchronised).expand_as(parts).reshape_as(counts_BE)
    yield "prefix", share_of(prefix).expand_as(parts).reshape_as(counts_BE)
    # Megatron-LM's loss: the running mean of the counts, and the gradient 1 / ranks too small (its issue 3672).
    yield "prefix, over the ranks", share_of(running_mean).expand_as(parts).reshape_as(counts_BE) / ranks


def router_gradient(weights: Weights, p: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Return the gradient of E · Σ f · P, whose shares E · f are given for each sequence (B, E) or for all (E,)."""
    share = share[:, None] if share.dim() == 2 else share
    loss = (share * p).sum() / p[..., 0].numel()
    return torch.autograd.grad(loss, weights.router, retain_graph=True)[0].flatten()


Row = tuple[float, float, float]


def measure(sequences: int, *, sorted_by_domain: bool, seed: int = 1) -> dict[str, Row]:
    """Return the medians of each way: norm over the exact gradient's, cosine to it, cosine to that of a large sample."""
    torch.manual_seed(seed)
    task, weights = Task(seed), Weights()
    adam = torch.optim.Adam([weights.router, weights.experts], lr=RATE)
    past = {keep: torch.ones(EXPERTS, dtype=torch.float64) for keep in KEEPS}
    seen: dict[str, list[Row]] = {}
    for step in range(STEPS):
        x, y = task.draw(sequences, sorted_by_domain=sorted_by_domain)
        p, chosen = weights.route(x)
        counts_BE = chosen.sum(1)
        share = share_of(counts_BE.sum(0))
        if step >= FIRST:
            exact = router_gradient(weights, p, share)
            with torch.no_grad():
                fresh, _ = task.draw(FRESH, sorted_by_domain=True)
            fresh_p, fresh_chosen = weights.route(fresh)
            population = router_gradient(weights, fresh_p, share_of(fresh_chosen.sum((0, 1))))
            ways = {"exact": share} | {f"past, keep {keep:g}": past[keep] for keep in KEEPS}
            for ranks, passes in GRID:
                ways |= {f"{name}, {ranks} × {passes}": each for name, each in prices(counts_BE, ranks, passes)}
            for name, each in ways.items():
                found = router_gradient(weights, p, each)
                row = float(found.norm() / exact.norm()), _cosine(found, exact), _cosine(found, population)
                seen.setdefault(name, []).append(row)
        adam.zero_grad()
        (weights.task_loss(x, y, p, chosen) + COEFFICIENT * (share * p).sum() / p[..., 0].numel()).backward()
        adam.step()
        for keep in KEEPS:
            past[keep] = keep * past[keep] + (1 - keep) * share
    return {name: _medians(rows) for name, rows in seen.items()}


def _medians(rows: Sequence[Row]) -> Row:
    ratio, to_exact, to_population = (statistics.median(column) for column in zip(*rows, strict=True))
    return ratio, to_exact, to_population


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="*", default=[64, 256])
    given = parser.parse_args()
    columns = [(count, by_domain) for count in given.sequences for by_domain in (True, False)]
    heads = [f"{count} sequences, {'sorted by domain' if by_domain else 'shuffled'}" for count, by_domain in columns]
    tables = [measure(count, sorted_by_domain=by_domain) for count, by_domain in columns]
    print("| Counts, ranks × passes |", " | ".join(heads), "|")
    print("|---" * (1 + len(heads)) + "|")
    for name in tables[0]:
        cells = ["{:.2f} / {:.2f} / {:.2f}".format(*table[name]) for table in tables]
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
