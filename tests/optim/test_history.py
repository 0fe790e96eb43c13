"""The batch's history: compact, and durations converted by it when a batch changes (rule R5)."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from meshloom.config.duration import Duration, Unit
from meshloom.optim.horizon import Horizon
from meshloom.optim.progress import Progress
from meshloom.optim.schedules.config import CosineConfig, LinearConfig, PowerConfig, WSDConfig
from meshloom.optim.schedules.schedule import Cosine, Linear, Schedule
from meshloom.optim.schedules.wsd import WSD, Power

SEQ_LEN = 16
UNITS = (Unit.STEPS, Unit.SAMPLES, Unit.TOKENS)


def walk(batches: Sequence[int], seq_lens: Sequence[int] | None = None) -> list[Progress]:
    """List the progress at the beginning of each step, and at the end."""
    lengths = seq_lens or [SEQ_LEN] * len(batches)
    found, progress = [], Progress()
    for batch, length in zip(batches, lengths, strict=True):
        before = progress.before(batch, length)
        found.append(before)
        progress = before.after(batch, batch * length)
    return [*found, progress.before(batches[-1], lengths[-1])]


def test_only_changes_are_kept_and_come_back_from_json() -> None:
    *_, end = walk([8] * 1000 + [16] * 1000 + [8])
    assert [tuple(point) for point in end.history.points] == [
        *((0, 0, 0, 8), (1000, 8000, 8000 * SEQ_LEN, 16), (2000, 24000, 24000 * SEQ_LEN, 8))
    ]
    assert Progress.from_state(json.loads(json.dumps(end.state_dict())), 99) == end


@pytest.mark.parametrize("seed", range(20))
def test_every_point_passed_is_converted_to_what_it_was(seed: int) -> None:
    """The oracle: a table of the counters at each step."""
    rng = random.Random(seed)
    batches, lengths = [], []
    while len(batches) < 60:
        count = rng.randrange(1, 20)
        batches += [rng.randrange(1, 9)] * count
        lengths += [rng.choice([16, 16, 24])] * count
    passed = walk(batches, lengths)
    end = passed[-1]
    for progress in passed:
        for here in UNITS:
            for there in UNITS:
                found = end.history.convert(progress.point.at(here), here, there, end.point, lengths[-1])
                assert found == pytest.approx(progress.point.at(there), rel=1e-12)


def test_tokens_ahead_are_converted_at_todays_batch() -> None:
    *_, end = walk([8] * 10 + [4] * 10)
    ahead = Horizon(Duration.parse("1000 steps"), SEQ_LEN, 4)
    assert ahead.convert(30, Unit.STEPS, Unit.SAMPLES, end) == 80 + 40 + 40
    assert ahead.convert(160 * SEQ_LEN, Unit.TOKENS, Unit.STEPS, end) == 30
    moving = Horizon(Duration.parse("1000 steps"), SEQ_LEN)
    assert moving.convert(15, Unit.STEPS, Unit.SAMPLES, end) == 100
    assert moving.convert(30, Unit.STEPS, Unit.SAMPLES, end) == math.inf
    assert moving.convert(200, Unit.SAMPLES, Unit.TOKENS, end) == 200 * SEQ_LEN


def test_a_state_without_history_counts_past_steps_as_alike() -> None:
    state = {"step": 10, "samples": 80, "tokens": 1280, "batch": 8}
    assert Progress.from_state(state, 8).history == walk([8] * 10)[-1].history
    grown = Progress.from_state({"step": 10, "samples": 200, "tokens": 3200, "batch": 40}, 8)
    assert grown.history.points[0].batch == 8
    assert grown.history.convert(5, Unit.STEPS, Unit.SAMPLES, grown.point, SEQ_LEN) == 100


def doubled(schedule: Schedule, step: int) -> float:
    """Return the rate at a step of a run whose batch was 8 for 20 steps, and 16 from then on."""
    return schedule.lr(walk([8] * 20 + [16] * 60)[step])


def resumed(length: str) -> Horizon:
    """Make the horizon of a run that is resumed with a batch of 16."""
    return Horizon(Duration.parse(length), SEQ_LEN, 16)


def test_a_warm_up_behind_stays_where_it_was() -> None:
    """10 steps of 8 samples, in a run of 1,000 samples: today's 16 would make it end at 160."""
    cosine = Cosine(CosineConfig(warmup="10 steps", final=0.0), 1.0, resumed("1000 samples"))
    linear = Linear(LinearConfig(warmup="10 steps", final=0.0), 1.0, resumed("1000 samples"))
    samples = 160 + 16 * 5
    part = (samples - 80) / 920
    assert doubled(cosine, 25) == pytest.approx((1 + math.cos(math.pi * part)) / 2)
    assert doubled(linear, 25) == pytest.approx(1 - part)


def test_a_decay_begins_where_its_samples_were_reached() -> None:
    """96 samples were reached at step 12; at today's batch they would have been at step 6."""
    schedule = WSD(WSDConfig(warmup=0, decay_start="96 samples", decay_form="linear"), 1.0, resumed("40 steps"))
    assert [doubled(schedule, step) for step in (6, 12, 26)] == pytest.approx([1, 1, 0.5])


def test_decay_counted_from_the_end_follows_actual_steps() -> None:
    """400 samples are 35 steps: 20 of 8 and 15 of 16. Its last 25 began at step 10."""
    schedule = WSD(WSDConfig(warmup=0, decay="25 steps", decay_form="linear"), 1.0, resumed("400 samples"))
    behind, whole = 160 - 80, 400 - 80
    assert doubled(schedule, 20) == pytest.approx(1 - behind / whole)
    assert doubled(schedule, 35) == pytest.approx(0)


def test_a_half_life_counts_its_own_unit() -> None:
    schedule = WSD(
        WSDConfig(warmup=0, decay_start="80 samples", decay_form="exponential", half_life="10 steps"),
        1.0,
        resumed("1000 samples"),
    )
    assert [doubled(schedule, step) for step in (10, 20, 30)] == pytest.approx([1, 0.5, 0.25])


def test_the_power_law_starts_at_the_end_of_the_warm_up_that_was() -> None:
    schedule = Power(PowerConfig(warmup="10 steps", a=1.0, b=-0.5, decay="1 samples"), 1e9, resumed("4000 samples"))
    held = Power(PowerConfig(warmup="80 samples", a=1.0, b=-0.5, decay="1 samples"), 1e9, resumed("4000 samples"))
    for step in (5, 10, 15, 25):
        assert doubled(schedule, step) == pytest.approx(doubled(held, step))


def test_a_batch_that_is_measured_finds_points_behind_it() -> None:
    schedule = Cosine(CosineConfig(warmup="10 steps", final=0.0), 1.0, Horizon(Duration.parse("1000 samples"), SEQ_LEN))
    assert schedule.problems() == []
    assert doubled(schedule, 9) == pytest.approx(1.0)
    part = (160 + 80 - 80) / 920
    assert doubled(schedule, 25) == pytest.approx((1 + math.cos(math.pi * part)) / 2)


@pytest.mark.parametrize(
    "keys",
    [
        {"warmup": "30 steps", "decay": 0},  # 480 samples at today's batch
        {"warmup": 0, "decay": "30 steps"},
        {"warmup": 0, "decay_start": "30 steps"},
        {"warmup": "10 steps", "decay_start": "100 samples"},  # at today's batch the warm-up would last to 160
    ],
)
def test_checks_before_a_resume_count_past_steps_as_they_were(keys: dict[str, Any]) -> None:
    """A run of 400 samples has 35 steps if its first 20 took 8 and the others take 16; 25 at today's batch alone."""
    config = WSDConfig(decay_form="linear", **keys)
    ahead, begun = resumed("400 samples"), walk([8] * 20 + [16])[20]
    assert WSD(config, 1.0, ahead).problems() != []
    assert WSD(config, 1.0, dataclasses.replace(ahead, begun=begun)).problems() == []


def test_a_warm_up_behind_is_known_while_the_batch_is_measured() -> None:
    config = PowerConfig(warmup="10 steps", decay="10%")
    ahead = Horizon(Duration.parse("100k tokens"), SEQ_LEN)
    assert [problem.key for problem in Power(config, 1.0, ahead).problems()] == ["schedule.warmup"]
    assert Power(config, 1.0, dataclasses.replace(ahead, begun=walk([8] * 21)[20])).problems() == []
