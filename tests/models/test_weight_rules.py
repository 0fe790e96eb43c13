"""Initial values, weight decay and learning rates, seen in the weights that an engine holds.

The expected numbers are written out from the papers: GPT-2's scaling of output projections by depth, and muP as in the
power scheduler (arXiv 2408.13359), where m_width is the width over the base width.
"""

from __future__ import annotations

import math

import pytest
import torch

from meshloom.data.batch import IGNORED, MicroBatch
from meshloom.parallel.engine import Engine
from support.parity import Work, build, equal_share, step
from support.ranks import run_ranks

DIM, LAYERS, LR, DECAY = 64, 3, 1e-3, 0.1
SHAPE = (("dim", DIM), ("layers", LAYERS), ("ffn_dim", 96))
MUP = (("mup_base", 16), ("mup_embedding", 12.0), ("mup_residual", 0.22))  # m_width is 4
IN_BLOCKS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Copy the weights, whole on one process."""
    return {each.name: each.tensor.clone() for each in engine.fragments() if each.role == "weight"}


def kind(name: str) -> str:
    """Return the kind of a weight: wq, …, w3 of the blocks; embed, head, norm."""
    part = name.split(".")[-2]
    return "norm" if part.endswith("norm") else part


def of_each_kind(numbers: dict[str, float]) -> dict[str, float]:
    """Map each kind to its number, which all weights of the kind share to about the fifth digit."""
    found: dict[str, float] = {}
    for name, number in numbers.items():
        assert found.setdefault(kind(name), number) == pytest.approx(number, rel=1e-5, abs=1e-12), name
    return found


def deviations(rank: int, world_size: int, work: Work) -> dict[str, float]:
    """Compute the initial standard deviation of each kind of weight."""
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, weight in weights(build(work, world_size)).items():
        kinds.setdefault(kind(name), []).append(weight.flatten())
    return {name: float(torch.cat(parts).std()) for name, parts in kinds.items()}


@pytest.mark.parametrize(("mup", "width"), [((), 1), (MUP, 4)], ids=["plain", "muP"])
def test_weights_begin_with_the_deviation_of_their_kind(mup: tuple[tuple[str, float], ...], width: int) -> None:
    (found,) = run_ranks(1, deviations, Work(model=(*SHAPE, *mup)))
    inner = 0.02 / math.sqrt(width)
    outward = inner / math.sqrt(2 * LAYERS)  # each block adds to the residual stream twice
    expected = {name: outward if name in ("wo", "w2") else inner for name in IN_BLOCKS}
    expected |= {"embed": 0.02, "head": 0.02, "norm": 0.0}
    assert found == pytest.approx(expected, rel=0.04, abs=1e-12)


def shrunk(rank: int, world_size: int, work: Work) -> dict[str, float]:
    """Measure the fraction that a weight loses in a step of zero gradient, over the learning rate."""
    engine = build(work, world_size)
    before = weights(engine)
    nothing = torch.full((2, 8), IGNORED)
    engine.accumulate(equal_share([MicroBatch(torch.zeros_like(nothing), nothing)]), torch.tensor(1.0, dtype=torch.float64))
    engine.update(LR)
    return of_each_kind({n: 1 - float((w / before[n]).nanmedian()) for n, w in weights(engine).items()})


@pytest.mark.parametrize(("mup", "width"), [((), 1), (MUP, 4)], ids=["plain", "muP"])
def test_only_matrices_of_blocks_and_the_head_decay(mup: tuple[tuple[str, float], ...], width: int) -> None:
    (found,) = run_ranks(1, shrunk, Work(lr=LR, model=(*SHAPE, *mup)))
    expected = dict.fromkeys(IN_BLOCKS, LR / width * DECAY) | {"head": LR * DECAY, "embed": 0.0, "norm": 0.0}
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


def moved(rank: int, world_size: int, work: Work) -> dict[str, float]:
    """Measure Adam's first step of a weight: the learning rate, whatever the gradient (Kingma and Ba, section 2.1)."""
    engine = build(work, world_size)
    before = weights(engine)
    step(engine, work, 0)
    after = weights(engine)
    return {kind(n): float((after[n] - before[n]).abs().median()) for n in before}


@pytest.mark.parametrize(("mup", "width"), [((), 1), (MUP, 4)], ids=["plain", "muP"])
def test_matrices_of_blocks_learn_more_slowly_by_the_width(mup: tuple[tuple[str, float], ...], width: int) -> None:
    # Large weights: no gradient is as small as Adam's epsilon.
    (found,) = run_ranks(1, moved, Work(lr=LR, max_norm=None, model=(*SHAPE, *mup, ("init_std", 0.2))))
    expected = dict.fromkeys(IN_BLOCKS, LR / width) | {"head": LR, "embed": LR, "norm": LR}
    assert found == pytest.approx(expected, rel=0.01)
