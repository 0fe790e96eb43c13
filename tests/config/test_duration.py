"""A duration as it is written, and what is too ambiguous to be taken for one."""

from __future__ import annotations

import pytest

from meshloom.config.duration import Duration, Unit, parse_count


@pytest.mark.parametrize(
    ("written", "value", "unit"),
    [
        (1, 1, Unit.STEPS),
        (200, 200, Unit.STEPS),
        ("2_000", 2000, Unit.STEPS),
        (0.999, 0.999, Unit.FRACTION),
        ("100%", 1, Unit.FRACTION),
        ("1.0%", 0.01, Unit.FRACTION),
        ("1.0 steps", 1, Unit.STEPS),
        (1e3, 1000, Unit.STEPS),
        ("1.5k", 1500, Unit.STEPS),
        ("1.5B tokens", 1_500_000_000, Unit.TOKENS),
        (0.0, 0, Unit.STEPS),
    ],
)
def test_a_duration_is_read(written: int | float | str, value: float, unit: Unit) -> None:
    assert Duration.parse(written) == Duration(value, unit)


@pytest.mark.parametrize(
    ("written", "fix"),
    [
        (1.0, "write 1 for steps, or '100%' of the run"),
        ("1.0", "write 1 for steps, or '100%' of the run"),
        (5.0, "write 5 for steps, or '5%' of the run"),
        (1.5, "write 2 for steps, or '1.5%' of the run"),
    ],
)
def test_a_number_that_may_be_steps_or_a_share_is_refused(written: float | str, fix: str) -> None:
    with pytest.raises(ValueError, match="may be steps or a share") as refusal:
        Duration.parse(written)
    assert str(refusal.value).endswith(fix)


@pytest.mark.parametrize("written", [1_500_000_000, "1500M", "1.5B", "1.5e9", 1.5e9, "1_500_000k", "1.5B tokens", "0.0015T"])
def test_a_count_is_read(written: str | int | float) -> None:
    assert parse_count(written, Unit.TOKENS) == 1_500_000_000


def test_a_count_is_exact() -> None:
    assert parse_count("1.001T", Unit.STEPS) == 1_001_000_000_000
    assert parse_count("9007199254740993", Unit.STEPS) == 2**53 + 1


@pytest.mark.parametrize("written", ["8 samples", "10%", "1.5", "1.0001k", "-3", "many", "inf", "1.5BB", ""])
def test_a_value_that_is_no_count_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="is no number of tokens"):
        parse_count(written, Unit.TOKENS)
