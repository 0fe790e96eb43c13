"""The drawing of a step: every document in its colour for its time, and what ranks wait."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from meshloom.parallel.hybrid.assignment import HybridAssignment, Row, Shared, in_lockstep
from meshloom.parallel.hybrid.cost import CostModel
from meshloom.planner.step_drawing import HEIGHT, WIDTH, Panel, colour_of, step_svg

SVG = "{http://www.w3.org/2000/svg}"
COSTS = CostModel(quadratic=0.0, linear=1.0)
LENGTHS = [60_000, 500, 3000, 10_000]
PLAN = HybridAssignment(
    rows=((Row((), (3,)), Row((0,), ()), Row((), (1,))), (Row((0,), (2,)), Row())),
    shared=(Shared(document=0, first=0, ranks=2),),
)  # rank 0 works 10,000 + 30,000 (and waits 3,000) + 500; rank 1 waits 10,000, works 33,000, and waits 500


def areas(drawn: str) -> dict[str, float]:
    """Colour → area of its rectangles that are as high as a rank's row."""
    found: dict[str, float] = {}
    for box in ElementTree.fromstring(drawn).iter(f"{SVG}rect"):
        if float(box.get("height", "0").rstrip("%")) == HEIGHT / 2 - 1:
            fill = box.get("fill", "")
            found[fill] = found.get(fill, 0.0) + float(box.get("width", "0"))
    return found


def test_documents_take_their_time_in_their_colour() -> None:
    drawn = step_svg([Panel("hybrid", PLAN)], LENGTHS, COSTS, "a < b")
    scale = WIDTH / 43_500
    expected = {colour_of(length): length * scale for length in LENGTHS}
    assert areas(drawn) == pytest.approx(expected, abs=0.3)
    assert "ranks wait 15.5% of the time" in drawn and "a &lt; b" in drawn


def test_panels_have_one_scale() -> None:
    drawn = step_svg([Panel("in turn", in_lockstep(PLAN)), Panel("hybrid", PLAN)], LENGTHS, COSTS, "")
    assert "in turn: 1.00 times" not in drawn and "hybrid: 1.00 times the fastest" in drawn


def test_waiting_is_counted_by_hand() -> None:
    assert PLAN.waiting(LENGTHS, COSTS) == pytest.approx(1 - (40_500 + 33_000) / (2 * 43_500))
    assert PLAN.step_time(LENGTHS, COSTS) == 43_500
