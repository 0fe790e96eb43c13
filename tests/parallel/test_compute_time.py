"""A rank's own work, told apart from its waiting for others."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meshloom.parallel import compute_time
from meshloom.parallel.compute_time import ComputeTime, StepWork
from meshloom.parallel.heartbeat import Heartbeat, Phase


def test_waiting_for_rings_in_passes_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((10.0, 12.5, 20.0, 20.5))
    monkeypatch.setattr(compute_time, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    heartbeat: Any = SimpleNamespace(totals=[0.0] * len(Phase), phase=Phase.FORWARD)
    measured = ComputeTime(torch.device("cpu"), heartbeat)
    assert measured.newest() == StepWork(0.0, 0.0)
    with measured.ring_waiting():  # of an evaluation: in no pass of a step
        pass
    with measured:
        for _ in range(2):
            with measured.ring_waiting():
                pass
    heartbeat.totals[Phase.FORWARD], heartbeat.totals[Phase.BACKWARD] = 4.0, 5.0
    assert measured.newest() == StepWork(6.0, 3.0)
    assert measured.newest() == StepWork(0.0, 0.0)


def test_waiting_in_layers_is_no_work_but_layers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(10.0)
    monkeypatch.setattr(compute_time, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    heartbeat: Any = SimpleNamespace(totals=[0.0] * len(Phase), phase=Phase.FORWARD)
    measured = ComputeTime(torch.device("cpu"), heartbeat)
    with measured:
        for _ in range(2):
            with measured.layer(), measured.collective_waiting():  # a second, within three
                pass
        heartbeat.phase = Phase.EXCHANGE  # within `waiting`, which leaves out all
        with measured.collective_waiting():
            pass
    heartbeat.totals[Phase.FORWARD] = 8.0
    assert measured.newest() == StepWork(6.0, 0.0, 6.0, 2)
    assert measured.newest() == StepWork(0.0, 0.0)


def fake_events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace events of a GPU by those of a clock that each moves by a second. Returns the list of those that are made."""
    made: list[Any] = []
    clock = [0.0]

    class Event:
        def __init__(self, **_options: object) -> None:
            made.append(self)

        def record(self) -> None:
            clock[0] += 1000.0  # ms
            self.at = clock[0]

        def query(self) -> bool:
            return True

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return made


def test_events_of_steps_that_were_read_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_events(monkeypatch)
    heartbeat: Any = SimpleNamespace(totals=[0.0] * len(Phase), phase=Phase.BACKWARD)
    measured = ComputeTime(torch.device("cuda"), heartbeat)
    for _ in range(3):
        with measured:
            for _ in range(2):
                with measured.ring_waiting():
                    pass
        assert measured.newest() == StepWork(3.0, 2.0)
    assert len(made) == 2 + 2 * 2


def test_a_stage_works_in_its_passes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_events(monkeypatch)
    measured = ComputeTime(torch.device("cuda"), Heartbeat())
    for _ in range(2):
        with measured:
            for phase in (Phase.FORWARD, Phase.BACKWARD):
                with measured.stage_pass(phase, 1), measured.layer(), measured.collective_waiting():
                    pass
        # Of each pass five seconds, of which it waited in one. Before, between and behind them it waits for other stages.
        assert measured.newest() == StepWork(8.0, 0.0, 6.0, 2)
        assert len(made) == 2 + 2 * 6
