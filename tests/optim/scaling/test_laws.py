"""Scaling laws against the papers' printed numbers, and fits against data made from known constants."""

from __future__ import annotations

import math

import numpy as np
import pytest

from meshloom.optim.scaling import laws
from meshloom.optim.scaling.fitting import fit_critical_batch, fit_critical_law, fit_loss, fit_power_law, optimum, steps_to


@pytest.mark.parametrize(
    ("parameters", "tokens", "lr", "batch"), [(7e9, 1.4e12, 9.1656e-4, 4.9988e6), (1e9, 1e11, 1.6325e-3, 1.1077e6)]
)
def test_step_law(parameters: float, tokens: float, lr: float, batch: float) -> None:
    assert laws.step_law_lr(parameters, tokens) == pytest.approx(lr, rel=1e-4)
    assert laws.step_law_batch(tokens) == pytest.approx(batch, rel=1e-4)


def test_power_law() -> None:
    """The paper prints 0.0011 for 10T tokens at 1,024 sequences, and the grid's optima 0.0128 and 0.0008 to a factor of 2."""
    assert laws.power_law_lr(1024 * 4096, 10e12) == pytest.approx(0.0011, rel=5e-3)
    for sequences, tokens, best in ((128, 2e9, 0.0128), (128, 256e9, 0.0008), (16, 128e9, 0.0002), (512, 128e9, 0.0064)):
        assert 0.5 <= laws.power_law_lr(sequences * 4096, tokens) / best <= 2
    assert laws.power_law_lr(1024 * 4096, 1e9) == 0.02, "the cap"


@pytest.mark.parametrize(
    ("loss", "kaplan", "minicpm"), [(4.0, 2.853e5, 2.118e5), (3.0, 1.1226e6, 1.275e6), (2.5, 2.675e6, 3.978e6)]
)
def test_critical_batch(loss: float, kaplan: float, minicpm: float) -> None:
    assert laws.critical_batch(loss) == pytest.approx(kaplan, rel=1e-3)
    assert laws.minicpm_batch(loss) == pytest.approx(minicpm, rel=1e-3)


def test_loss_laws() -> None:
    assert laws.chinchilla_loss(70e9, 1.4e12) == pytest.approx(1.937, abs=5e-4)  # Hoffmann et al.'s own Chinchilla
    law = laws.LossLaw()
    # the equation holds, and its two limits: infinite steps, and a batch so large that S_min = S
    loss = law.loss(1e9, 1e5, 5e5)
    steps_min = 1e5 / (1 + laws.critical_batch(loss, 1.7e8, 0.205) / 5e5)
    assert loss == pytest.approx((1.5e14 / 1e9) ** 0.076 + (2.6e3 / steps_min) ** 0.67, rel=1e-9)
    assert law.loss(1e9, 1e15, 1e6) == pytest.approx(law.at_infinite_steps(1e9), rel=1e-6)
    assert law.loss(1e9, 1e5, 1e15) == pytest.approx(law.at_infinite_steps(1e9) + 0.026**0.67, rel=1e-6)


def test_mup_multipliers_of_the_papers_models() -> None:
    assert laws.MuP.of(2304).width == 9  # PowerLM-3B
    assert laws.MuP.of(1536) == laws.MuP(6, 12, 0.22)  # PowerMoE-3B


def test_automatic_values_and_their_units() -> None:
    """Both laws give tokens; a run wants sequences, in multiples of batch.multiple."""
    assert laws.automatic_lr("step_law", 7e9, 1.4e12, 0) == pytest.approx(9.1656e-4, rel=1e-4)
    assert laws.automatic_lr("power", 0, 10e12, 1024 * 4096) == pytest.approx(0.0011, rel=5e-3)
    assert laws.automatic_batch("step_law", 1.4e12, 2048, 1) == 2441
    assert laws.automatic_batch("step_law", 1.4e12, 2048, 32) == 2432
    assert laws.automatic_batch("step_law", 1e3, 2048, 32) == 32
    with pytest.raises(ValueError, match="auto:step_law, auto:power"):
        laws.automatic_lr("moon", 1, 1, 1)
    with pytest.raises(ValueError, match="auto:step_law"):
        laws.automatic_batch("moon", 1, 1, 1)


def test_ranges() -> None:
    assert laws.STEP_LR.extrapolated(N=1e8, D=1e10) == []
    assert laws.STEP_LR.extrapolated(N=7e9, D=1e12) == ["N", "D"]
    assert laws.MINICPM_BATCH.extrapolated(L=3.0) == [], "nothing is known"


# Fits.


def test_power_laws_are_recovered_with_their_uncertainty() -> None:
    random = np.random.default_rng(3)
    N, D = np.exp(random.uniform(15, 20, 200)), np.exp(random.uniform(20, 25, 200))
    noise = 0.05
    law = fit_power_law(1.79 * N**-0.713 * D**0.307 * np.exp(random.normal(0, noise, 200)), N=N, D=D)
    assert law.exponents == pytest.approx({"N": -0.713, "D": 0.307}, abs=0.01)
    assert law.spread == pytest.approx(noise, rel=0.15)
    # a uniform variable on an interval of width 5 has standard deviation 5 / √12
    assert law.errors["N"] == pytest.approx(noise / math.sqrt(200) / (5 / math.sqrt(12)), rel=0.2)
    assert law(N=1e9, D=1e11) == pytest.approx(laws.step_law_lr(1e9, 1e11), rel=0.05)
    with pytest.raises(ValueError, match="N, D apart"):
        fit_power_law([1, 2, 3], N=[1, 2, 3], D=[5, 5, 5])


def test_optimum_of_a_sweep() -> None:
    """Losses that are a parabola in ln lr give its vertex; a sweep that ends at its best says so."""
    rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    losses = [3 + 0.1 * math.log(rate / 8e-4) ** 2 for rate in rates]
    found = optimum(rates[::-1], losses[::-1])
    assert (found.value, found.loss, found.inside) == (pytest.approx(8e-4), pytest.approx(3.0), True)
    assert optimum(rates[:2], losses[:2]).inside is False


def test_loss_law_is_recovered() -> None:
    """Hoffmann et al.'s constants back from the losses that they predict."""
    N, D = (grid.ravel() for grid in np.meshgrid(np.geomspace(7e7, 1.6e10, 6), np.geomspace(5e9, 5e11, 6)))
    fit = fit_loss(N, D, [laws.chinchilla_loss(n, d) for n, d in zip(N, D, strict=True)])
    found = (fit.floor, fit.n_constant, fit.n_power, fit.d_constant, fit.d_power)
    assert found == pytest.approx((1.69, 406.4, 0.34, 410.7, 0.28), rel=1e-3)
    assert fit(70e9, 1.4e12) == pytest.approx(1.937, abs=1e-3)
    with pytest.raises(ValueError, match="five constants"):
        fit_loss([1, 2], [1, 2], [1, 2])
    with pytest.raises(ValueError, match="more than one size"):
        fit_loss([1] * 6, range(1, 7), range(1, 7))


def test_critical_batch_is_recovered() -> None:
    batches = np.geomspace(1e4, 1e7, 7)
    fit = fit_critical_batch(batches, 5000 * (1 + 3e5 / batches))
    assert (fit.steps_min, fit.batch) == (pytest.approx(5000, rel=1e-5), pytest.approx(3e5, rel=1e-5))
    # the definition: at B = B_crit, twice the fewest steps
    assert 5000 * (1 + fit.batch / fit.batch) == 10_000


def test_critical_law_is_recovered_from_loss_curves() -> None:
    """Curves made by the loss law with Kaplan's B_crit: its constants come back from their crossings."""
    law = laws.LossLaw(b_scale=2.1e8, b_power=0.21)
    steps = np.geomspace(200, 2e6, 400)
    curves = {batch: (steps, np.array([law.loss(1e8, s, batch) for s in steps])) for batch in (1e5, 4e5, 1.6e6, 6.4e6)}
    found, fits = fit_critical_law(curves, np.linspace(3.2, 4.5, 8))
    assert len(fits) == 8
    assert found.exponents["L"] == pytest.approx(-1 / 0.21, rel=0.01)
    assert found(L=3.5) == pytest.approx(laws.critical_batch(3.5), rel=0.01)


def test_crossings() -> None:
    assert steps_to(2.5, [0, 10, 20], [4.0, 3.0, 2.0]) == 15
    assert steps_to(1.0, [0, 10, 20], [4.0, 3.0, 2.0]) is None
    assert steps_to(5.0, [0, 10, 20], [4.0, 3.0, 2.0]) is None
