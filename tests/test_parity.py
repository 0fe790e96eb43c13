"""The promise, as a table: every layout gives the losses of a bare PyTorch loop in one process, in float64."""

from __future__ import annotations

import pytest
import torch

from meshloom.config.parallel import ParallelConfig
from parity import Work, curves, gradients, plain_curve
from ranks import run_ranks

TOLERANCE = 1e-9


def parallel(**settings: object) -> ParallelConfig:
    return ParallelConfig(**settings)  # type: ignore[arg-type]


TABLE = [
    (1, Work(parallel(zero=0))),
    (1, Work(parallel(zero=1), micro=3)),
    (1, Work(parallel(zero=2), micro=8)),
    (1, Work(parallel(zero=3), micro=2)),
    *[(2, Work(parallel(zero=zero), micro=micro)) for zero in (0, 1, 2, 3) for micro in (1, 4)],
    *[(4, Work(parallel(zero=zero), micro=1)) for zero in (0, 1, 2, 3)],
    *[(4, Work(parallel(zero=zero, replicate=2), micro=1)) for zero in (1, 2, 3)],
    (2, Work(parallel(zero=3), micro=2, model=(("tied", True),))),
    (2, Work(parallel(zero=2), micro=2, documents=True)),
    (2, Work(parallel(zero=3), micro=2, activation="full")),
    (2, Work(parallel(zero=3), micro=2, activation="selective")),
    (2, Work(parallel(zero=3), micro=2, activation="offload")),
    (2, Work(parallel(zero=3), micro=2, model=(("mup_base", 8), ("mup_embedding", 12.0), ("mup_residual", 0.22)))),
]


def name(case: object) -> str:
    if isinstance(case, Work):
        axes = case.parallel
        extra = "-".join(f"{key}" for key, _ in case.model)
        return f"zero{axes.zero}-rep{axes.replicate}-micro{case.micro}-{case.activation}-{extra}{'docs' * case.documents}"
    return str(case)


@pytest.mark.parametrize(("ranks", "work"), TABLE, ids=name)
def test_losses_and_norms_are_those_of_a_bare_loop(ranks: int, work: Work) -> None:
    losses, norms = plain_curve(work)
    for rank_losses, rank_norms in run_ranks(ranks, curves, work):
        assert rank_losses == pytest.approx(losses, rel=TOLERANCE)
        assert rank_norms == pytest.approx(norms, rel=TOLERANCE)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_of_every_parameter_agree(zero: int) -> None:
    work = Work(parallel(zero=zero), betas=(0.0, 0.0), max_norm=None)
    whole = {key.split(" ")[0]: tensor for key, (_, tensor) in run_ranks(1, gradients, work)[0].items()}
    for found in run_ranks(2, gradients, work):
        for key, (_place, tensor) in found.items():
            _shape, box = _place
            expected = whole[key.split(" ")[0]][box.slices()]
            assert torch.allclose(tensor, expected, rtol=1e-10, atol=1e-14), key
