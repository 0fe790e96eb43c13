"""Reports of saves come in their order, and asking for them holds nobody up."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshloom.checkpoint.report import SaveReport, culprit_of
from support.checkpoint_runs import open_run


class Ending:
    """A save whose end comes while one asks for it, and whose stall is known when `settled`."""

    def __init__(self, step: int, outcome: str) -> None:
        self.step, self.report, self.snapshot = step, SaveReport(step, outcome), self
        self.asked, self.settled, self.others = 0, True, [self]

    @property
    def ended(self) -> bool:
        known, self.others[0].asked = self.others[0].asked, 1
        return known > 0

    def join(self) -> None:
        """It has ended."""

    def device_stall(self) -> float:
        assert self.settled, "the host waits for the GPU"
        return 0.0


def test_saves_are_reported_in_order_once_the_gpu_passed_them(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    first, second = Ending(1, "failed"), Ending(2, "committed")
    first.others = second.others = [first]  # both end between two questions
    run._saves += [first, second]  # type: ignore[list-item]
    told = [report.step for _ in range(3) for report in run.poll()]
    assert told == [1, 2]
    assert run._last_report is not None and run._last_report.outcome == "committed"
    late = Ending(3, "committed")
    late.asked, late.settled = 1, False
    run._saves.append(late)  # type: ignore[arg-type]
    assert run.poll() == []
    late.settled = True
    assert [report.step for report in run.poll()] == [3]
    run.close()


@pytest.mark.parametrize(
    ("reason", "culprit"),
    [
        ("rank 0: no answer on “files” within 600 s; missing: rank 3", 3),
        ("rank 2: no answer on “files” within 600 s (checkpoint.timeout); missing: rank 16", 16),
        ("rank 0: no answer on “files” within 600 s; missing: rank 8, or one that it sends for", None),
        ("rank 5: no answer on “decision” within 600 s", None),
        ("rank 3: OSError: no room", 3),
        ("rank 12 wrote 5 bytes, the plan has 6 for it", 1),  # of its own
        ("OSError: no room", 1),
    ],
)
def test_the_rank_at_fault_is_the_one_that_is_missing_not_the_one_that_waits(reason: str, culprit: int | None) -> None:
    report = SaveReport(7, "failed", reason, culprit_of(reason, 1))
    assert report.culprit == culprit and "checkpoint/culprit" not in report.metrics()
