"""A parameter that stacks matrices, as a mixture's experts do, is updated as these matrices would be by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.distributed as dist

from meshloom.optim.optimizers.config import LAMBConfig, LARSConfig
from meshloom.optim.optimizers.layerwise import LAMB, LARS
from meshloom.optim.optimizers.parameters import NamedParameter, Unsharded
from support.ranks import run_ranks

COUNT, ROWS, COLUMNS = 3, 4, 5
FACTORIES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "lamb": partial(LAMB, LAMBConfig(weight_decay=0.1)),
    "lars": partial(LARS, LARSConfig(trust=0.1)),
}


def drawn(seed: int) -> torch.Tensor:
    """A stack whose matrices differ in size, so that one norm of all would show."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 10.0]).repeat_interleave(ROWS)[:, None]
    return torch.randn(COUNT * ROWS, COLUMNS, generator=random, dtype=torch.float64) * scale


class SumOverRanks(Unsharded):
    """Sums over all ranks, each of which has other rows."""

    def sum(self, values: torch.Tensor, parameters: Sequence[NamedParameter]) -> torch.Tensor:
        dist.all_reduce(values)
        return values


def updated(kind: str, pieces: dict[str, slice], stacked: int, shards: Unsharded) -> dict[str, torch.Tensor]:
    """Train rows of the stack for three steps, as parameters of these names."""
    rows = COUNT * ROWS if stacked > 1 else ROWS
    parameters = [
        NamedParameter(
            name,
            torch.nn.Parameter(drawn(0)[where].clone()),
            (rows, COLUMNS),
            offsets=(where.start if stacked > 1 else 0, 0),
            stacked=stacked,
        )
        for name, where in pieces.items()
    ]
    optimizer = FACTORIES[kind](parameters, shards)
    for step in range(3):
        for parameter, where in zip(parameters, pieces.values(), strict=True):
            parameter.tensor.grad = drawn(10 + step)[where].clone()
        optimizer.step()
    return {parameter.name: parameter.tensor.detach() for parameter in parameters}


def sharded(rank: int, world: int, kind: str) -> torch.Tensor:
    rows = [slice(0, 7), slice(7, 12)][rank]  # inside the second matrix
    return updated(kind, {"w1": rows}, COUNT, SumOverRanks())["w1"]


@pytest.mark.parametrize("kind", FACTORIES)
def test_stacked_matrices_have_trust_ratios_of_their_own(kind: str) -> None:
    apart = {f"w1.{each}": slice(each * ROWS, (each + 1) * ROWS) for each in range(COUNT)}
    expected = torch.cat(list(updated(kind, apart, 1, Unsharded()).values()))
    whole = updated(kind, {"w1": slice(0, COUNT * ROWS)}, COUNT, Unsharded())["w1"]
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat(run_ranks(2, sharded, kind)), expected, rtol=1e-12, atol=1e-14)
