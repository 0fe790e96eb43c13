"""A duration as it is written, and what is too ambiguous to be taken for one."""

from __future__ import annotations

import pytest

from meshloom.config.duration import Duration, Unit


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
