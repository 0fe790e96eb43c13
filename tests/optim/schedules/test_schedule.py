"""Schedules against closed forms and the papers' printed numbers, and the problems they report."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.config.duration import Duration
from meshloom.optim.horizon import Horizon
from meshloom.optim.progress import Progress
from meshloom.optim.schedules.config import FORMS, CosineConfig, LinearConfig, PowerConfig, ScheduleConfig, WSDConfig
from meshloom.optim.schedules.decay import WINDOWED
from meshloom.optim.schedules.schedule import Constant, Cosine, Linear, Schedule
from meshloom.optim.schedules.wsd import WSD, Power

PEAK = 0.01

CONFIGS = {Constant: ScheduleConfig, Cosine: CosineConfig, Linear: LinearConfig, WSD: WSDConfig, Power: PowerConfig}


def make(kind: type[Schedule], peak: float, run: Horizon, **options: Any) -> Any:
    """Make a schedule, by default without a warm-up."""
    return kind(CONFIGS[kind](**{"warmup": 0, **options}), peak, run)


def at(step: int, batch: int = 8, seq_len: int = 16) -> Progress:
    return Progress(step, step * batch, step * batch * seq_len, batch)


def horizon(length: str = "1000 steps", batch: int | None = 8, seq_len: int = 16) -> Horizon:
    return Horizon(Duration.parse(length), seq_len, batch)


def test_warm_up_rises_to_the_peak_and_its_first_step_trains() -> None:
    schedule = make(Constant, PEAK, horizon(), warmup=100)
    assert [schedule.lr(at(step)) / PEAK for step in (0, 49, 99, 100, 999)] == pytest.approx([0.01, 0.5, 1, 1, 1])


@pytest.mark.parametrize("written", ["100 steps", "800 samples", "12800 tokens", "10%", 0.1, 100, "12.8k tokens"])
@pytest.mark.parametrize("length", ["1000 steps", "8000 samples", "128000 tokens"])
def test_units_of_equal_worth_give_the_same_schedule(written: str | float, length: str) -> None:
    """With a constant batch of 8 × 16 tokens, all of these say the same."""
    schedule = make(WSD, PEAK, horizon(length), warmup=written, decay=written, decay_form="linear")
    reference = make(WSD, PEAK, horizon(), warmup=100, decay=100, decay_form="linear")
    assert schedule.problems() == []
    for step in (0, 37, 100, 500, 900, 901, 950, 999):
        assert schedule.lr(at(step)) == pytest.approx(reference.lr(at(step)), rel=1e-12)


def test_cosine_and_linear_against_their_closed_forms() -> None:
    cosine = make(Cosine, PEAK, horizon(), warmup=100, final=0.1)
    linear = make(Linear, PEAK, horizon(), warmup=100, final=0.2)
    for step in (100, 200, 550, 775, 999):
        part = (step - 100) / 900
        assert cosine.lr(at(step)) == pytest.approx(PEAK * (0.55 + 0.45 * math.cos(math.pi * part)))
        assert linear.lr(at(step)) == pytest.approx(PEAK * (1 - 0.8 * part))
    assert cosine.lr(at(1000)) == pytest.approx(0.1 * PEAK)
    assert linear.lr(at(5000)) == pytest.approx(0.2 * PEAK), "a run that goes past its end keeps the last rate"


def test_minicpm_decay_halves_at_its_half_life() -> None:
    """MiniCPM: half-life 5,000 steps from step 263,000 on."""
    schedule = make(
        WSD, PEAK, horizon("300000 steps"), warmup=2000, decay_form="exponential", decay_start=263000, half_life=5000
    )
    factors = [schedule.lr(at(step)) / PEAK for step in (262_999, 263_000, 268_000, 273_000)]
    assert factors == [1, 1, 0.5, 0.25]


def test_half_life_left_out_reaches_the_final_ratio_at_the_end() -> None:
    schedule = make(WSD, PEAK, horizon(), decay=100, decay_form="exponential", final=0.125)
    assert [schedule.lr(at(step)) / PEAK for step in (900, 1000, 1100)] == pytest.approx([1, 0.125, 0.125])
    assert schedule.lr(at(950)) / PEAK == pytest.approx(0.125**0.5), "a half-life of 100 / 3 steps"


def test_windowed_forms_at_known_points() -> None:
    assert WINDOWED["1-sqrt"](0.25) == 0.5
    assert WINDOWED["linear"](0.25) == 0.75
    assert WINDOWED["cosine"](0.5) == pytest.approx(0.5)
    for shape in WINDOWED.values():
        assert (shape(0.0), shape(1.0)) == pytest.approx((1, 0), abs=1e-15)
    # open-lm-engine's formula, d its final ratio
    d, e = 0.1, math.e
    for x in (0.0, 0.3, 1.0):
        theirs = (1 - d) * e / (e - 1) * math.exp(-x) + (d * e - 1) / (e - 1)
        assert d + (1 - d) * WINDOWED["exponential_to_zero"](x) == pytest.approx(theirs)


@pytest.mark.parametrize("form", FORMS)
def test_wsd_is_continuous_and_never_rises_after_the_warm_up(form: str) -> None:
    schedule = make(WSD, PEAK, horizon("100000 steps"), warmup=1000, decay="20%", decay_form=form, final=0.05)
    assert schedule.problems() == []
    rates = [schedule.lr(at(step)) for step in range(999, 100_000)]
    assert rates[0] == PEAK and rates[79_001] == PEAK
    drops = [before - after for before, after in itertools.pairwise(rates)]
    assert min(drops) >= 0
    # 1-sqrt falls steepest at its start, by 0.95 / √20000 in the first step
    assert max(drops) <= 1.0001 * PEAK * 0.95 / math.sqrt(20_000)
    assert rates[-1] == pytest.approx(0.05 * PEAK, abs=1e-4 * PEAK)


def test_a_stable_run_is_brought_down_from_a_new_start() -> None:
    """Resumed at step 600 of 1,000 with an earlier end: equal before the branch, then straight down to the new end."""
    long = make(WSD, PEAK, horizon("1000 steps"), warmup=50, decay="10%", decay_form="linear")
    branch = make(WSD, PEAK, horizon("700 steps"), warmup=50, decay="10%", decay_form="linear", decay_start=600)
    assert all(long.lr(at(step)) == branch.lr(at(step)) for step in range(600))
    assert [branch.lr(at(step)) / PEAK for step in (600, 650, 675)] == pytest.approx([1, 0.5, 0.25])


@given(st.integers(0, 10**6), st.integers(0, 10**9), st.integers(1, 10**5))
@settings(deadline=None)
def test_the_rate_is_a_function_of_progress_alone(step: int, samples: int, batch: int) -> None:
    """Rule R5: asked in any order, any number of times, after any history, the answer is the same."""
    progress = Progress(step, samples, samples * 16, batch)
    schedules: list[Schedule] = [make(Cosine, PEAK, horizon("1M steps")), make(Power, PEAK, horizon("1T tokens", batch=None))]
    for schedule in schedules:
        first = schedule.lr(progress)
        schedule.lr(at(17))
        assert schedule.lr(progress) == first
        assert 0 <= first <= PEAK


# The power schedule: a batch of β sequences of 4,096 tokens.


def power(beta: float, tokens: float, cap: float = 0.02) -> float:
    schedule = make(Power, cap, Horizon(Duration.parse("100T tokens"), 4096, None))
    return schedule.law(tokens, beta)


@pytest.mark.parametrize(
    ("beta", "tokens", "rate"),
    [(1024, 1e11, 0.010054), (1024, 1e12, 0.0031071), (128, 1e12, 3.884e-4)],
)
def test_power_law_values(beta: int, tokens: float, rate: float) -> None:
    assert power(beta, tokens) == pytest.approx(rate, rel=1e-4)


def test_power_law_meets_its_cap_where_it_should() -> None:
    assert power(1024, 2.590e10) == 0.02
    assert 0.0199 < power(1024, 2.602e10) < 0.02
    assert power(1024, 2.596e10) == pytest.approx(0.02, rel=1e-3)


def test_power_law_of_the_stable_phase_is_the_papers() -> None:
    """β · 4.6 · T^−0.51 is their fit for WSD: 0.0011 for 10T tokens at a batch of 1,024."""
    schedule = make(Power, 0.02, Horizon(Duration.parse("100T tokens"), 4096, None), a=4.6)
    assert schedule.law(10e12, 1024) == pytest.approx(0.0011, rel=5e-3)


def test_power_counts_sequences_of_4096_tokens() -> None:
    short = make(Power, 0.02, Horizon(Duration.parse("100T tokens"), 1024, None))
    assert short.law(1e12, 4096) == pytest.approx(power(1024, 1e12))


def test_power_follows_the_current_batch() -> None:
    schedule = make(Power, 1.0, Horizon(Duration.parse("1T tokens"), 4096, None))
    small, large = (schedule.lr(Progress(10**5, 10**7, 4096 * 10**7, batch)) for batch in (256, 1024))
    assert large == pytest.approx(4 * small)


def test_power_warms_up_to_the_law_and_decays_from_it() -> None:
    """lr-engine's three pieces: n / N_w · η(N_w), then η(n), then f · η(N − N_d)."""
    run = Horizon(Duration.parse("1T tokens"), 4096, 1024)
    schedule = make(Power, 1.0, run, warmup="1B tokens", decay="10%")
    law = lambda n: 1024 * 4 * n**-0.51  # noqa: E731
    stride = 1024 * 4096

    def rate(tokens: float) -> float:
        steps = round(tokens / stride)
        return schedule.lr(Progress(steps, steps * 1024, steps * stride, 1024))

    steps = round(0.5e9 / stride)
    assert rate(0.5e9) == pytest.approx((steps + 1) * stride / 1e9 * law(1e9))
    assert rate(5e11) == pytest.approx(law(5e11), rel=1e-5)
    middle = round(0.95e12 / stride) * stride
    part = (middle - 0.9e12) / 0.1e12
    assert rate(0.95e12) == pytest.approx((math.exp(1 - part) - 1) / (math.e - 1) * law(0.9e12))


# Messages to a user.


def problems(schedule: Schedule) -> list[str]:
    return [str(problem) for problem in schedule.problems()]


def test_every_bad_value_is_reported_at_once() -> None:
    config = WSDConfig(warmup="abc", decay="12 parsecs", decay_form="square", final=2.0)
    found = {problem.key: str(problem) for problem in config.problems()}
    assert list(found) == ["schedule.warmup", "schedule.final", "schedule.decay", "schedule.decay_form"]
    assert "'12 parsecs' is not a duration; write 200" in found["schedule.decay"]
    assert [p.key for p in PowerConfig(a=0, b=1).problems("s")] == ["s.a", "s.b"]


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    assert "longer than the run" in problems(make(WSD, PEAK, horizon(), warmup=2000))[0]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"decay": 1001}, "schedule.decay"),
        ({"decay_start": 1001}, "schedule.decay_start"),
        ({"warmup": 200, "decay_start": 100}, "schedule.decay_start"),
        ({"warmup": "60%", "decay": "50%"}, "schedule.decay"),
        ({"decay_form": "exponential"}, "schedule.half_life"),
        ({"decay_form": "exponential", "half_life": 0}, "schedule.half_life"),
        ({"decay_form": "linear", "half_life": 10}, "schedule.half_life"),
    ],
)
def test_impossible_decays(options: dict[str, object], key: str) -> None:
    config = WSDConfig(**{"warmup": 0, **options})  # type: ignore[arg-type]
    found = config.problems() or WSD(config, PEAK, horizon()).problems()
    assert [problem.key for problem in found] == [key]
    assert found[0].fix


def test_units_without_an_exchange_rate() -> None:
    """Steps and tokens can't be compared while the batch changes: refused where it matters, allowed where it doesn't."""
    moving = horizon("1B tokens", batch=None)
    assert problems(make(WSD, PEAK, moving, warmup="100 steps")) == []
    assert problems(make(WSD, PEAK, moving, decay="10%")) == []
    assert problems(make(Power, PEAK, moving, decay="1M samples")) == []
    assert [p.key for p in make(WSD, PEAK, moving, decay="100 steps").problems()] == ["schedule.decay"]
    assert problems(make(Cosine, PEAK, moving, warmup="100 steps")) == []
    assert problems(make(WSD, PEAK, moving, decay_start="100 steps", decay_form="exponential", half_life="9 steps")) == []
    assert "schedule.warmup" in [p.key for p in make(Power, PEAK, moving, warmup="100 steps").problems()]
    assert "schedule.decay" in [p.key for p in make(Power, PEAK, horizon("1000 steps", batch=None)).problems()]
