"""Reports of saves come in their order, and asking for them holds nobody up."""

from __future__ import annotations

from pathlib import Path

from meshloom.checkpoint.report import SaveReport
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
