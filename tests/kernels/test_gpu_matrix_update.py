"""The pointwise kernels of matrix optimizers beside their formulas in float64, and Muon's fused step beside torch's operations.

They also run without a GPU, by Triton's interpreter: TRITON_INTERPRET=1 pytest tests/kernels/test_gpu_matrix_update.py
"""

from __future__ import annotations

import os

import pytest
import torch

from meshloom.optim.build import build_optimizer
from meshloom.optim.optimizers import matrix
from meshloom.optim.optimizers.config import OptimConfig
from meshloom.optim.optimizers.matrix_config import AdafactorConfig, APOLLOConfig, MuonConfig, NorMuonConfig
from meshloom.optim.optimizers.parameters import FusedStep, MaskedStep, NamedParameter, Unsharded

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else pytest.mark.gpu
pytest.importorskip("triton")

SHAPES = [(70, 1003), (1, 1), (64, 48)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAN = float("nan")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def number(value: float | None) -> torch.Tensor | None:
    return None if value is None else torch.tensor(value, device=DEVICE)


def flag(value: float | None) -> torch.Tensor | None:
    """Return a skip. The interpreter takes the outcome of comparing one float for a float, so there it is an integer."""
    return None if value is None else torch.tensor(value, device=DEVICE, dtype=torch.int32 if INTERPRETED else torch.float32)


def assert_rounded(found: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor | None = None) -> None:
    """Check that a result is the nearest of its dtype to one in fp64, but for errors of fp32 arithmetic on terms so large.

    The interpreter does not round to the nearest bf16 number, but towards zero.
    """
    kind = torch.finfo(found.dtype)
    spacing = kind.eps * exact.abs() + kind.eps * kind.smallest_normal
    error = 0.0 if terms is None else 2 * torch.finfo(torch.float32).eps * terms
    assert ((found.double() - exact).abs() <= error + spacing * (1.0 if INTERPRETED else 0.5)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "skip"), [(None, None), (0.3, 0.0), (None, 0.0), (0.3, None)])
def test_momentum_and_lookahead(
    shape: tuple[int, int], dtype: torch.dtype, nesterov: bool, scale: float | None, skip: float | None
) -> None:
    from meshloom.kernels.triton_matrix_update import momentum_update

    momentum, gradient = drawn(*shape), drawn(*shape, seed=1).to(dtype)
    before, g = momentum.double(), gradient.double() * (1.0 if scale is None else float(torch.tensor(scale)))
    lookahead = torch.full_like(gradient, NAN)
    momentum_update(momentum, gradient, lookahead, number(scale), flag(skip), beta=0.95, nesterov=nesterov)
    after = 0.95 * before + 0.05 * g
    terms = before.abs() + g.abs()
    assert_rounded(momentum, after, terms)
    assert_rounded(lookahead, 0.05 * g + 0.95 * after if nesterov else after, terms)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip", [None, 0.0])
def test_decay_and_step(shape: tuple[int, int], dtype: torch.dtype, skip: float | None) -> None:
    from meshloom.kernels.triton_matrix_update import weight_update

    for copied in (torch.bfloat16, None):
        weight, update = drawn(*shape), drawn(*shape, seed=1).to(dtype)
        copy = None if copied is None else torch.full_like(weight, NAN, dtype=copied)
        exact = 0.997 * weight.double() - 0.01 * update.double()
        terms = weight.double().abs() + update.double().abs()
        weight_update(weight, update, copy, flag(skip), keep=0.997, rate=0.01)
        assert_rounded(weight, exact, terms)
        if copy is not None:
            assert_rounded(copy, weight.double())


def test_what_does_not_lie_row_by_row_is_matched_by_place() -> None:
    from meshloom.kernels.triton_matrix_update import momentum_update, weight_update

    gradient = drawn(48, 64).T
    momentum, lookahead, weight = drawn(64, 48, seed=1), torch.empty(64, 48, device=DEVICE), drawn(64, 48, seed=2)
    exact = 0.5 * momentum + 0.5 * gradient
    momentum_update(momentum, gradient, lookahead, beta=0.5, nesterov=False)
    torch.testing.assert_close(momentum, exact)
    assert torch.equal(lookahead, momentum)
    exact = 0.5 * weight - 0.25 * gradient
    weight_update(weight, gradient, keep=0.5, rate=0.25)
    torch.testing.assert_close(weight, exact)


def test_what_is_skipped_lets_nothing_in_that_is_not_finite() -> None:
    from meshloom.kernels.triton_matrix_update import momentum_update, weight_update

    bad, skip = torch.full((64, 48), NAN, device=DEVICE), flag(1.0)
    for scale in (None, number(NAN)):
        momentum, lookahead = drawn(64, 48), torch.full((64, 48), NAN, device=DEVICE)
        before = momentum.clone()
        momentum_update(momentum, bad, lookahead, scale, skip, beta=0.95, nesterov=True)
        assert torch.equal(momentum, before) and not lookahead.any()
    weight = drawn(64, 48)
    before, copy = weight.clone(), weight.bfloat16()
    weight_update(weight, bad, copy, skip, keep=0.9, rate=0.1)
    assert torch.equal(weight, before) and torch.equal(copy, weight.bfloat16())


def steps_of(config: OptimConfig, dtype: torch.dtype, grad_dtype: torch.dtype, *, fused: bool) -> list[list[torch.Tensor]]:
    """Weights, compute copies and state after each of five steps, by fused kernels or by torch's operations in another dtype.

    Where the optimizer can, the fourth step is skipped, with gradients and a scale that are not numbers. The second has no
    scale, and in the third a matrix has no gradient.
    """
    device = DEVICE if fused else "cpu"
    shapes = {"embed.weight": (40, 24), "layers.0.norm": (24,), "layers.0.w": (24, 40), "layers.0.stack": (60, 24)}
    held = {name: torch.nn.Parameter(drawn(*shape, seed=9).to(device, dtype)) for name, shape in shapes.items()}
    copies = {name: torch.full_like(each, NAN, dtype=torch.bfloat16) for name, each in held.items() if fused}
    named = [
        NamedParameter(
            name,
            held[name],
            shape,
            decay=len(shape) > 1,
            compute_copy=copies.get(name),
            stacked=3 if name.endswith("stack") else 1,
            hidden=name in ("layers.0.w", "layers.0.stack"),
        )
        for name, shape in shapes.items()
    ]
    optimizer = build_optimizer(config, named, Unsharded())
    assert isinstance(optimizer, FusedStep) and optimizer.fused_step == fused
    assert isinstance(optimizer, MaskedStep)
    found: list[list[torch.Tensor]] = []
    for step in range(5):
        skipped = step == 3
        if skipped and not optimizer.masked_step:
            continue
        scale = 1.0 if step == 1 else 0.4 + step
        for number_, weight in enumerate(held.values()):
            weight.grad_dtype = None
            gradient = drawn(*weight.shape, seed=10 * step + number_).to(device, grad_dtype)
            weight.grad = gradient if fused else gradient.to(dtype) * scale
            if skipped:
                weight.grad.fill_(NAN)
        if step == 2:
            held["layers.0.w"].grad = None
        if fused and step != 1:
            optimizer.gradient_scale = torch.tensor(NAN if skipped else scale, device=device)
        if optimizer.masked_step and step != 0:
            optimizer.skip = flag(float(skipped)) if fused else torch.tensor(float(skipped))
        optimizer.step()
        assert optimizer.skip is None and optimizer.gradient_scale is None, "they are for one step"
        if skipped:
            optimizer.forget_steps(1)
        weights = [each.detach().clone() for each in held.values()]
        for name, copy in copies.items():
            assert_rounded(copy, held[name].detach().double())
        states = [value for each in held.values() for key, value in optimizer.state[each].items() if key != "step"]
        found.append([each.detach().clone() for each in [*weights, *states, *(own.tensor for own in optimizer.own_arrays())]])
        assert all(each.isfinite().all() for each in found[-1])
        if skipped:
            assert all(torch.equal(now, before) for now, before in zip(found[-1], found[-2], strict=True))
    return found


CONFIGS: dict[str, OptimConfig] = {
    "muon": MuonConfig(lr=0.02, weight_decay=0.3),
    "muon without Nesterov": MuonConfig(lr=0.02, nesterov=False, adamw_lr=0.01),
    "normuon": NorMuonConfig(lr=0.02, weight_decay=0.3),
    "apollo": APOLLOConfig(lr=0.01, rank=4, interval=2),
    "adafactor": AdafactorConfig(lr=0.01),
}


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_fused_step_is_that_of_torchs_operations(kind: str, grad_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(matrix, "have_kernels", lambda weights: all(weight.dtype == torch.float32 for weight in weights))
    exact = steps_of(CONFIGS[kind], torch.float64, grad_dtype, fused=False)
    ours = steps_of(CONFIGS[kind], torch.float32, grad_dtype, fused=True)
    for step, (found, expected) in enumerate(zip(ours, exact, strict=True)):
        for one, two in zip(found, expected, strict=True):
            assert (one.cpu().double() - two).norm() <= 2e-5 * two.norm(), (kind, step)
