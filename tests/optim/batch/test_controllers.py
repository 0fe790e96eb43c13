"""Batch-size controllers: estimators against Gaussian gradients of known moments, decisions against closed forms."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.config.duration import Duration
from meshloom.config.nodes import import_object
from meshloom.optim.batch.adaptive import Adaptive, Augmented, CriticalLoss, InnerProduct, NoiseScale, NormTest
from meshloom.optim.batch.config import (
    OPTIONS,
    AdaptiveConfig,
    AugmentedConfig,
    BatchConfig,
    CriticalLossConfig,
    FixedConfig,
    InnerProductConfig,
    NoiseScaleConfig,
    NormTestConfig,
    RampConfig,
    StagesConfig,
)
from meshloom.optim.batch.controller import Fixed, Ramp, Stages
from meshloom.optim.batch.statistics import GradientStatistics, MovingMeans
from meshloom.optim.horizon import Horizon
from meshloom.optim.progress import Progress

HORIZON = Horizon(Duration.parse("1000B tokens"), 1000)


def at(samples: int = 0, step: int = 0, batch: int = 0) -> Progress:
    return Progress(step, samples, samples * HORIZON.seq_len, batch)


def problems(config: BatchConfig) -> list[str]:
    return [str(problem) for problem in config.problems()]


# Estimators.


def of_workers(gradients_JD: np.ndarray, m: float) -> GradientStatistics:
    """Compute the statistics by their definition, for equal shares."""
    g = gradients_JD.mean(0)
    return GradientStatistics(
        worker_square=float((gradients_JD**2).sum(1).mean()),
        batch_square=float(g @ g),
        workers=len(gradients_JD),
        worker_samples=m,
        projection_square=float(((gradients_JD @ g) ** 2).mean()),
    )


def test_estimators_on_gaussian_gradients() -> None:
    """ALGORITHMS 1.2: tr Σ = 100, ‖μ‖² = 1, J = 8, m = 4, d = 1000, so E N = 1 + 100 / 32 and b* = 400 at η = 0.5."""
    random = np.random.default_rng(5)
    J, m, d, draws = 8, 4, 1000, 4000
    mean = np.zeros(d)
    mean[0] = 1.0
    found = [of_workers(mean + random.normal(0, math.sqrt(0.1 / m), (J, d)), m) for _ in range(draws)]
    variance, signal, square = (np.mean([getattr(s, key) for s in found]) for key in ("variance", "signal", "batch_square"))
    # three standard errors: tr Σ̂ is a χ² of 7000 degrees of freedom times 100 / 7000
    assert variance == pytest.approx(100, abs=3 * 100 * math.sqrt(2 / 7000 / draws))
    assert signal == pytest.approx(1, abs=0.02)
    assert square == pytest.approx(4.125, abs=0.02)
    controller = norm_test(micro=1, max=10_000, unbiased=True, ema=0.99999, shrink=True)
    for statistics in found:
        controller.observe(statistics, 0.0, at(step=1))
    assert controller.next_batch(at()) == pytest.approx(400, rel=0.02)
    assert controller.noise_scale == pytest.approx(100, rel=0.02)


def test_estimates_from_workers_of_different_sizes_are_unbiased() -> None:
    """Workers of 3, 3 and 1 samples of variance 20 around a mean of norm 1, weighted by their samples."""
    random, sizes = np.random.default_rng(3), np.array([3, 3, 1])
    mean, weights = np.eye(1, 20)[0], sizes / 7
    found: list[GradientStatistics] = []
    for _ in range(40_000):
        g_JD = mean + random.normal(0, 1, (3, 20)) / np.sqrt(sizes)[:, None]
        g = weights @ g_JD
        found.append(GradientStatistics(float(weights @ (g_JD**2).sum(1)), float(g @ g), 3, 7 / 3))
    assert np.mean([each.variance for each in found]) == pytest.approx(20, rel=0.01)
    assert np.mean([each.signal for each in found]) == pytest.approx(1, abs=0.04)


def test_estimates_from_single_samples_are_the_textbook_ones() -> None:
    """With one sample a worker, m = 1, the definitions of the tests over samples (ALGORITHMS 1.1) hold exactly."""
    g_bD = np.random.default_rng(0).normal(0.3, 1.0, (6, 5))
    g = g_bD.mean(0)
    statistics = of_workers(g_bD, 1)
    products = g_bD @ g
    across_bD = g_bD - np.outer(products, g) / (g @ g)
    assert statistics.variance == pytest.approx(g_bD.var(0, ddof=1).sum())
    assert statistics.projection_variance == pytest.approx(products.var(ddof=1))
    assert statistics.orthogonal_variance == pytest.approx(across_bD.var(0, ddof=1).sum())
    # noise along and noise across make up the whole noise
    parts = statistics.orthogonal_variance + statistics.projection_variance / statistics.batch_square
    assert parts == pytest.approx(statistics.variance)


def test_noise_scale_is_mccandlishs() -> None:
    """|G|² and S of arXiv 1812.06162 A.1 with B_small = m and B_big = b."""
    statistics = GradientStatistics(worker_square=9.0, batch_square=4.0, workers=4, worker_samples=8)
    small, big = 8, 32
    signal = (big * 4.0 - small * 9.0) / (big - small)
    noise = (9.0 - 4.0) / (1 / small - 1 / big)
    assert statistics.metrics() == pytest.approx(
        {"gradient_variance": noise, "gradient_norm_squared": signal, "noise_scale": noise / signal}
    )
    assert "noise_scale" not in GradientStatistics(90.0, 4.0, 4, 8).metrics(), "no signal seen"


def test_moving_means_forget_their_start() -> None:
    means = MovingMeans(0.9)
    means.update({"x": 5.0})
    assert means["x"] == 5.0
    means.update({"x": 1.0})
    assert means["x"] == pytest.approx((0.9 * 5 + 1) / 1.9)


# Micro-batches that grow.


def growing(multiple: int | None = None, **options: Any) -> NormTest:
    """It starts with two micro-batches of eight."""
    sizes: dict[str, Any] = {"samples": 16, "micro": 8, "max": 1000, "multiple": multiple, "micro_max": 64, **options}
    return NormTest(NormTestConfig(**sizes), HORIZON)


@pytest.mark.parametrize(
    ("wanted", "size", "micro"),
    [
        (16, 16, 8),  # two micro-batches of eight
        (24, 24, 8),  # three
        (30, 32, 16),
        (32, 32, 16),
        (40, 48, 16),
        (70, 96, 32),
        (100, 128, 64),
        (128, 128, 64),  # two of 64, the largest allowed
        (950, 960, 64),
        (10**6, 1000, 64),  # batch.max, though it is no multiple of 64
    ],
)
def test_measured_sizes_fill_their_grown_micro_batches(wanted: int, size: int, micro: int) -> None:
    assert growing().rounded(wanted) == size and growing().micro_at(size) == micro


@given(st.integers(1, 3000), st.integers(1, 300), st.sampled_from([1, 3, 8]), st.sampled_from([1, 2, 8]))
def test_a_step_keeps_as_many_micro_batches_as_the_first(size: int, start: int, micro: int, growth: int) -> None:
    controller = growing(samples=start, micro=micro, micro_max=micro * growth, max=5000)
    now = controller.micro_at(size)
    at_start = -(-start // micro)
    assert now in (micro, 2 * micro, 4 * micro, 8 * micro) and now <= micro * growth
    assert now == micro or size // now >= at_start
    assert now == micro * growth or size // (2 * now) < at_start, "it is as large as may be"


@given(st.floats(1, 1e4), st.sampled_from([None, 8, 24, 64]))
def test_a_size_is_the_start_the_maximum_or_a_multiple(wanted: float, multiple: int | None) -> None:
    size = growing(multiple).rounded(wanted)
    assert size in (16, 1000) or (size % (multiple or 8) == 0 and size % growing(multiple).micro_at(int(wanted)) == 0)
    assert size >= min(wanted, 1000)


def test_sizes_depend_on_micro_only_where_gradients_are_measured() -> None:
    """There `batch.micro` says how a step is computed, not what."""
    configs = [CriticalLossConfig(samples=16, micro=m, max=1000, micro_max=8 * m) for m in (4, 8)]
    small, large = (CriticalLoss(config, HORIZON) for config in configs)
    assert [small.rounded(n) for n in range(1, 1200, 7)] == [large.rounded(n) for n in range(1, 1200, 7)]
    assert small.rounded(101) == 101


def test_a_micro_batch_stays_where_it_is_not_to_grow() -> None:
    assert growing(micro_max=None).micro_at(512) == 8
    for unreached in (24, 4):
        (problem,) = problems(NormTestConfig(samples=16, micro=8, max=1000, micro_max=unreached))
        assert "batch.micro_max" in problem and "doublings" in problem


# Planned controllers.


def stages(written: str, samples: int | None = None) -> StagesConfig:
    return StagesConfig(stages=written, samples=samples, micro=8)


def test_stages() -> None:
    config = stages("0:768 250B:1536")
    controller = Stages(config, HORIZON)
    assert problems(config) == [] and controller.problems() == []
    sizes = [controller.next_batch(at(samples)) for samples in (0, 249_999_999, 250_000_000, 999_000_000)]
    assert sizes == [768, 768, 1536, 1536]


def test_a_first_point_at_zero_wins_over_the_recipes_samples() -> None:
    config = stages("0:16 5B:24", samples=10)
    assert problems(config) == [] and Stages(config, HORIZON).next_batch(at()) == 16


def test_stages_accept_other_durations_and_their_own_start() -> None:
    config = stages("25%:16 2000steps:24", samples=8)
    controller = Stages(config, HORIZON)
    assert problems(config) == [] and controller.problems() == []
    assert [controller.next_batch(at(s, step)) for s, step in ((0, 0), (250_000_000, 5), (250_000_000, 2000))] == [8, 16, 24]


@pytest.mark.parametrize(
    ("written", "samples", "key"),
    [
        ("0:768;250B:1536", None, "batch.stages"),
        ("", 8, "batch.stages"),
        ("5B", 8, "batch.stages"),
        ("5B:16", None, "batch.samples"),
        ("5B:16", 0, "batch.samples"),
        ("0:16 5B:0", None, "batch.stages"),
        ("0:0 5B:8", None, "batch.stages"),
    ],
)
def test_faulty_stages(written: str, samples: int | None, key: str) -> None:
    found = stages(written, samples).problems()
    assert [problem.key for problem in found] == [key]
    assert all(problem.fix for problem in found)


def test_points_of_stages_rise_along_the_run() -> None:
    (problem,) = Stages(stages("0:16 5B:24 4B:32"), HORIZON).problems()
    assert problem.key == "batch.stages" and "don't rise" in problem.message
    assert Stages(stages("0:16 5B:24 50%:32"), HORIZON).problems() == []


def ramp_config(samples: int, max: int, over: str | float = "600B tokens", multiple: int | None = None) -> RampConfig:
    return RampConfig(samples=samples, micro=4, max=max, over=over, multiple=multiple)


def test_ramp_rises_in_equal_steps() -> None:
    """16, 24, … 64 over 600 M samples: seven sizes, a new one every 100 M."""
    assert problems(ramp_config(16, 64)) == []
    controller = Ramp(ramp_config(16, 64, multiple=8), HORIZON)
    sizes = [controller.next_batch(at(samples * 10**6)) for samples in (0, 99, 100, 250, 599, 600, 900)]
    assert sizes == [16, 16, 24, 32, 56, 64, 64]
    assert Ramp(ramp_config(16, 64, over="60%", multiple=8), HORIZON).next_batch(at(250 * 10**6)) == 32
    assert Ramp(ramp_config(16, 64), HORIZON).next_batch(at(250 * 10**6)) == 36, "any number of samples"
    coarse = Ramp(ramp_config(10, 50, over=0.6, multiple=16), HORIZON)
    assert [coarse.next_batch(at(s * 10**6)) for s in (0, 300, 600)] == [10, 16, 50]


def test_settings_that_give_no_batch_are_refused_with_a_way_out() -> None:
    assert problems(FixedConfig(samples=10, micro=8)) == []
    assert problems(FixedConfig(samples=0, micro=8)) == ["batch.samples: 0 is not a number of samples; use 1 or more"]
    assert problems(RampConfig(samples=8, over="0 steps")) == [
        "batch.over: a ramp needs a length; give a duration, or choose batch=fixed"
    ]
    bad: dict[str, Any] = {"samples": 32, "max": 16, "interval": 0, "ema": 1.0, "growth": 1.0, "multiple": 0, "eta": 0}
    found = AugmentedConfig(micro=8, nu=-1.0, **bad).problems()
    assert [p.key.removeprefix("batch.") for p in found] == ["multiple", "max", "interval", "ema", "growth", "eta", "nu"]


@pytest.mark.parametrize("option", OPTIONS)
def test_a_config_says_whether_its_controller_measures(option: type[BatchConfig]) -> None:
    assert import_object(option._target_).needs_statistics == option.MEASURES


# Measured controllers.


def statistics(variance: float, square: float, workers: int = 4, m: float = 8) -> GradientStatistics:
    """Make statistics with this tr Σ and N."""
    return GradientStatistics(square + variance * (workers - 1) / (m * workers), square, workers, m)


def norm_test(**options: Any) -> NormTest:
    """Make one that decides at every step from the newest measurement, and only grows, unless told otherwise."""
    plain: dict[str, Any] = {"interval": 1, "ema": 0.0, "growth": None, "shrink": False}
    return NormTest(NormTestConfig(**{"micro": 8, "samples": 32, "max": 1000, "eta": 0.5, **plain, **options}), HORIZON)


def test_norm_test_proposes_the_smallest_batch_that_passes() -> None:
    """tr Σ = 100, N = 2, η = 0.5: 100 / (0.25 · 2) = 200, which is a multiple of 8."""
    controller = norm_test()
    controller.observe(statistics(100, 2), 0.0, at(step=1))
    assert controller.next_batch(at()) == 200
    assert 100 / 200 <= 0.25 * 2 < 100 / 199
    controller.observe(statistics(101, 2), 0.0, at(step=2))
    assert controller.next_batch(at()) == 208, "202 rounded up to whole micro-batches"


def test_norm_test_passes_and_never_shrinks_unless_told() -> None:
    kept, shrunk = norm_test(), norm_test(shrink=True)
    for controller in (kept, shrunk):
        controller.observe(statistics(100, 2), 0.0, at(step=1))
        controller.observe(statistics(20, 1), 0.0, at(step=2))
    assert (kept.next_batch(at()), shrunk.next_batch(at())) == (200, 80)
    shrunk.observe(statistics(0, 1), 0.0, at(step=3))
    assert shrunk.next_batch(at()) == 32, "never under the start"


def test_literal_form_lacks_the_factor_of_samples_per_worker() -> None:
    """(1/J) Σ ‖g_j − g‖² in place of tr Σ: 100 · 3 / 32 / (0.01 · 2) = 468.75, where the consistent form asks for 5,000."""
    literal, consistent = (norm_test(literal=flag, max=10**6, eta=0.1, multiple=None) for flag in (True, False))
    for controller in (literal, consistent):
        controller.observe(statistics(100, 2), 0.0, at(step=1))
    assert (literal.next_batch(at()), consistent.next_batch(at())) == (472, 5000)


def test_bounds_on_a_change() -> None:
    controller = norm_test(growth=2.0, max=100)
    sizes: list[int] = []
    for step in (1, 2, 3):
        controller.observe(statistics(1e6, 1), 0.0, at(step=step))
        sizes.append(controller.next_batch(at()))
    assert sizes == [64, 100, 100], "doubled, then batch.max"


def test_decisions_wait_for_their_interval() -> None:
    controller = norm_test(interval=5)
    wanted = [step for step in range(10) if controller.measures(at(step=step))]
    assert wanted == [4, 9], "the steps whose end is a decision"
    for step in range(1, 5):
        controller.observe(statistics(100, 2), 0.0, at(step=step))
        assert controller.next_batch(at()) == 32
    controller.observe(statistics(100, 2), 0.0, at(step=5))
    assert controller.next_batch(at()) == 200
    assert all(norm_test(interval=5, ema=0.5).measures(at(step=step)) for step in range(10))


def test_means_are_averaged_not_ratios() -> None:
    controller = norm_test(ema=0.5)
    controller.observe(statistics(100, 1), 0.0, at(step=1))
    controller.load_state_dict({**controller.state_dict(), "target": 32.0})
    controller.observe(statistics(40, 4), 0.0, at(step=2))
    assert controller.next_batch(at()) == 80, "(50 + 40) / (0.5 + 4) / 0.25; the mean of the ratios would ask for more"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_diverged_changes_nothing(bad: float) -> None:
    controller, loss = norm_test(), CriticalLoss(CriticalLossConfig(micro=8, samples=32, max=1000), HORIZON)
    before = controller.state_dict(), loss.state_dict()
    controller.observe(statistics(bad, 2), 0.0, at(step=1))
    controller.observe(None, 0.0, at(step=2))
    loss.observe(None, bad, at(step=10))
    assert (controller.state_dict(), loss.state_dict()) == before


def with_projection(s: float) -> GradientStatistics:
    return GradientStatistics(10.0, 2.0, workers=4, worker_samples=8, projection_square=s)


def test_inner_product_and_augmented_tests() -> None:
    """(S − N²) m J / (J − 1) = (4.3 − 4) · 32 / 3 = 3.2 along, (A − S / N) · 32 / 3 = 83.73 across; N = 2."""
    at_once: dict[str, Any] = {"micro": 1, "samples": 1, "max": 10**6, "growth": None, "interval": 1, "ema": 0.0}
    inner = InnerProduct(InnerProductConfig(eta=0.1, **at_once), HORIZON)
    augmented = Augmented(AugmentedConfig(eta=0.1, nu=0.5, **at_once), HORIZON)
    for controller in (inner, augmented):
        controller.observe(with_projection(4.3), 0.0, at(step=1))
    assert inner.next_batch(at()) == math.ceil(3.2 / (0.01 * 4))
    assert augmented.next_batch(at()) == math.ceil((10 - 4.3 / 2) * 32 / 3 / (0.25 * 2))
    with pytest.raises(ValueError, match="batch=norm_test"):
        inner.observe(statistics(1, 1), 0.0, at(step=2))


@pytest.mark.parametrize("config", [NormTestConfig, InnerProductConfig, AugmentedConfig, NoiseScaleConfig])
def test_a_noisy_step_does_not_raise_the_batch_for_good(config: type[AdaptiveConfig]) -> None:
    """With the defaults of every controller that measures gradients, the size falls once their noise has gone."""
    kinds = {NormTestConfig: NormTest, InnerProductConfig: InnerProduct, AugmentedConfig: Augmented}
    kind: Any = kinds.get(config, NoiseScale)
    controller = kind(config(micro=1, samples=8, max=1000), HORIZON)
    noisy, quiet = (GradientStatistics(square, 2.0, 4, 8, projection_square=s) for square, s in ((10.0, 9.0), (2.0, 4.0)))
    for step in range(1, 301):
        controller.observe(noisy if step <= 20 else quiet, 0.0, at(step=step))
        if step == 20:
            assert controller.next_batch(at(step=step)) > 8
    assert controller.next_batch(at()) == 8


def test_noise_scale_controller() -> None:
    """‖E g‖² = N − tr Σ / b: with tr Σ = 64, N = 4, b = 32 the signal is 2 and the scale 32; η = 2 wants 64."""
    sizes: dict[str, Any] = {"micro": 1, "samples": 8, "max": 1000}
    controller = NoiseScale(NoiseScaleConfig(**sizes, eta=2.0, growth=None, interval=1, ema=0.0), HORIZON)
    assert controller.noise_scale is None
    controller.observe(statistics(64, 4), 0.0, at(step=1))
    assert controller.noise_scale == pytest.approx(32)
    assert controller.next_batch(at()) == 64
    controller.observe(statistics(200, 4), 0.0, at(step=2))
    assert controller.noise_scale == math.inf and controller.next_batch(at()) == 1000, "no signal: as large as allowed"


@pytest.mark.parametrize(("loss", "tokens"), [(4.0, 2.853e5), (3.0, 1.1226e6), (2.5, 2.675e6), (2.0, 7.740e6)])
def test_critical_batch_of_a_loss(loss: float, tokens: float) -> None:
    """Kaplan's B_crit (ALGORITHMS 1.4)."""
    config = CriticalLossConfig(micro=1, samples=8, max=10**6, growth=None, interval=1, ema=0.0)
    controller = CriticalLoss(config, HORIZON)
    assert controller.needs_loss and not controller.needs_statistics
    controller.observe(None, loss, at(step=1))
    assert controller.next_batch(at()) == pytest.approx(tokens / HORIZON.seq_len, rel=3e-3)


ADAPTIVE: list[tuple[type[Adaptive], type[AdaptiveConfig], dict[str, Any]]] = [
    (NormTest, NormTestConfig, {"ema": 0.9, "interval": 1}),
    (InnerProduct, InnerProductConfig, {"interval": 3}),
    (Augmented, AugmentedConfig, {"shrink": True}),
    (NoiseScale, NoiseScaleConfig, {}),
    (CriticalLoss, CriticalLossConfig, {"interval": 2}),
]


@pytest.mark.parametrize(("kind", "config", "options"), ADAPTIVE)
@given(cut=st.integers(0, 30), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_a_resumed_controller_continues_unchanged(
    kind: type[Adaptive], config: type[AdaptiveConfig], options: dict[str, Any], cut: int, seed: int
) -> None:
    """Stopped anywhere, saved as JSON, loaded into a new one: the same sizes; and any size is legal."""

    def new() -> Adaptive:
        return kind(config(micro=8, samples=16, max=500, **options), HORIZON)

    random = np.random.default_rng(seed)
    records = [of_workers(random.normal(0.5, 1, (4, 6)), 4) for _ in range(30)]

    def go(controller: Adaptive, first: int, last: int) -> list[int]:
        sizes: list[int] = []
        for step in range(first, last):
            sizes.append(controller.next_batch(at(step=step)))
            controller.observe(records[step], 3.0 + 1 / (1 + step), at(step=step + 1))
        return sizes

    whole = go(new(), 0, 30)
    first = new()
    sizes = go(first, 0, cut)
    second = new()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert sizes + go(second, cut, 30) == whole
    multiple = 8 if kind.needs_statistics else 1
    assert all((size % multiple == 0 or size == 500) and 16 <= size <= 500 for size in whole)


def test_sizes_that_a_user_wrote_are_not_rounded() -> None:
    """From 4 to 20 in multiples of 8, and the multiple is for what lies in between."""
    ramp = Ramp(ramp_config(4, 20, multiple=8), HORIZON)
    sizes = [ramp.next_batch(at(samples * 10**6)) for samples in (0, 200, 450, 599, 600)]
    assert sizes == [4, 8, 16, 16, 20]
    measured = norm_test(samples=12, max=100)
    sizes = []
    for variance in (1e-3, 7, 100):
        measured.observe(statistics(variance, 2), 0.0, at(step=1))
        sizes.append(measured.next_batch(at()))
    assert sizes == [12, 16, 100]


def test_resume_under_another_controller_keeps_the_size() -> None:
    """The new kind's own means start afresh; a size below its own start, or a controller that had none, gives its start."""
    first = norm_test()
    first.observe(statistics(100, 2), 0.0, at(step=1))
    second = CriticalLoss(CriticalLossConfig(micro=8, samples=32, max=1000), HORIZON)
    second.load_state_dict(first.state_dict())
    assert second.next_batch(at()) == 200 and second.noise_scale is None
    larger = NoiseScale(NoiseScaleConfig(micro=8, samples=256, max=1000), HORIZON)
    larger.load_state_dict(first.state_dict())
    assert larger.next_batch(at()) == 256
    larger.load_state_dict(Fixed(FixedConfig(samples=32, micro=8), HORIZON).state_dict())
    assert larger.next_batch(at()) == 256
