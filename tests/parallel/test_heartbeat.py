"""Heartbeats: what a rank writes is what another process reads, and durations are those that have passed."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest
import torch

from meshloom.parallel.compute_time import ComputeTime
from meshloom.parallel.heartbeat import OWN_WORK, RECENT, Heartbeat, Phase, read_beat
from support.ranks import run_ranks


class Clock:
    """A clock that is moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_phases_and_durations_are_read_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    heartbeat = Heartbeat(tmp_path / "beat")
    for step in range(1, 4):
        heartbeat.begin_step(step)
        clock.now += 0.5
        for micro_batch, seconds in ((1, 2.0), (2, 3.0 + step)):
            heartbeat.beat(Phase.FORWARD, micro_batch)
            clock.now += seconds
        heartbeat.beat(Phase.EXCHANGE)
        clock.now += 1.0
    heartbeat.begin_step(4)
    beat = read_beat(tmp_path / "beat")
    assert beat is not None
    assert (beat.phase, beat.step, beat.micro_batch, beat.steps_done, beat.pid) == (Phase.DATA, 4, 0, 3, os.getpid())
    assert beat.since == clock.now and beat.beats == heartbeat_count(3)
    assert beat.usual[Phase.FORWARD] == pytest.approx((2.0 + 4.0) / 2)  # of 2, 4, 2, 5, 2, 6
    assert beat.usual[Phase.EXCHANGE] == 1.0 and Phase.SAVE not in beat.usual
    assert beat.step_usual == pytest.approx(8.5)  # of 7.5, 8.5, 9.5
    assert sum(heartbeat.totals[phase] for phase in OWN_WORK) == pytest.approx(22.5)


def test_the_time_of_a_save_is_told_and_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    heartbeat = Heartbeat(tmp_path / "beat")
    for seconds in (3.0, 5.0, 4.0):
        heartbeat.beat(Phase.DATA)
        clock.now += seconds
        heartbeat.beat(Phase.SAVE)
        clock.now += 0.1
    beat = read_beat(tmp_path / "beat")
    assert beat is not None and beat.longest[Phase.DATA] == 5.0 and Phase.SAVE not in beat.longest
    heartbeat.learn(Phase.SAVE, 60.0)
    beat = read_beat(tmp_path / "beat")
    assert beat is not None and beat.longest[Phase.SAVE] == 60.0


def test_an_evaluation_is_as_long_as_all_of_its_micro_batches(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "beat")
    for micro_batch in range(3):
        heartbeat.beat(Phase.EVALUATION, micro_batch)
    heartbeat.beat(Phase.HOOKS)
    heartbeat.learn(Phase.EVALUATION, 60.0)
    beat = read_beat(tmp_path / "beat")
    assert beat is not None and beat.longest[Phase.EVALUATION] == 60.0 and Phase.EVALUATION not in beat.usual


def test_a_phase_that_goes_on_begins_anew_for_the_watch_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    heartbeat = Heartbeat(tmp_path / "beat")
    heartbeat.beat(Phase.SAVE)
    clock.now += 50.0
    heartbeat.go_on(Phase.UPDATE)  # of a save in the background: this rank does something else
    beat = read_beat(tmp_path / "beat")
    assert beat is not None and beat.since == clock.now - 50.0
    heartbeat.go_on(Phase.SAVE)
    beat = read_beat(tmp_path / "beat")
    assert beat is not None and beat.since == clock.now and beat.beats == 3
    clock.now += 5.0
    heartbeat.beat(Phase.HOOKS)
    assert heartbeat.totals[Phase.SAVE] == 55.0


def test_waiting_within_a_pass_leaves_the_pass_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    heartbeat = Heartbeat(tmp_path / "beat")
    compute_time = ComputeTime(torch.device("cpu"), heartbeat)
    for micro_batch in (1, 2):
        heartbeat.beat(Phase.FORWARD, micro_batch)
        for _ in range(3):
            clock.now += 1.0
            with contextlib.suppress(RuntimeError), compute_time.waiting():
                clock.now += 0.5
                beat = read_beat(tmp_path / "beat")
                assert beat is not None and (beat.phase, beat.micro_batch) == (Phase.EXCHANGE, micro_batch)
                raise RuntimeError("a lost peer")
        beat = read_beat(tmp_path / "beat")
        assert beat is not None and (beat.phase, beat.since) == (Phase.FORWARD, clock.now)
    heartbeat.beat(Phase.UPDATE)
    beat = read_beat(tmp_path / "beat")
    assert beat is not None and beat.usual[Phase.FORWARD] == 4.5 and Phase.EXCHANGE not in beat.usual
    assert (heartbeat.totals[Phase.FORWARD], heartbeat.totals[Phase.EXCHANGE]) == (6.0, 3.0)


def heartbeat_count(steps: int) -> int:
    return 1 + 4 * steps + 1


def test_a_first_step_that_compiles_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    heartbeat = Heartbeat(tmp_path / "beat")
    usual: list[float | None] = []
    for step, seconds in enumerate([300.0, *[1.0] * (RECENT + 1)], start=1):
        heartbeat.begin_step(step)
        beat = read_beat(tmp_path / "beat")
        assert beat is not None
        usual.append(beat.step_usual)
        clock.now += seconds
    assert usual[:4] == [None, None, pytest.approx(150.5), 1.0] and usual[-1] == 1.0


def test_no_record_and_a_torn_one_are_none(tmp_path: Path) -> None:
    assert read_beat(tmp_path / "none") is None
    (tmp_path / "short").write_bytes(b"\x01")
    assert read_beat(tmp_path / "short") is None
    Heartbeat(tmp_path / "beat")
    content = bytearray((tmp_path / "beat").read_bytes())
    content[0] = 7  # the first of the two counts, which a writer changes first
    (tmp_path / "torn").write_bytes(content)
    assert read_beat(tmp_path / "torn") is None


def beat_on(rank: int, world_size: int, folder: str) -> int | None:
    Heartbeat(Path(folder) / f"{rank}").beat(Phase.UPDATE)
    beat = read_beat(Path(folder) / f"{rank}")
    return None if beat is None else beat.pid


def test_the_record_outlives_its_process(tmp_path: Path) -> None:
    pids = run_ranks(2, beat_on, str(tmp_path))
    for rank in range(2):
        beat = read_beat(tmp_path / f"{rank}")
        assert beat is not None and beat.pid == pids[rank] and beat.phase is Phase.UPDATE
