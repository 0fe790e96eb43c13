"""`incidents.jsonl`: every line whole, whoever writes; no fault of the disk ends a run; another run moves it aside."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
from pathlib import Path

import pytest

from meshloom.checkpoint.identity import RunIdentity
from meshloom.trainer.identity import take_over_metrics
from meshloom.trainer.watch.incidents import INCIDENTS, Incident, IncidentLog, read_incidents
from support.ranks import run_ranks


def test_an_incident_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    log = IncidentLog(tmp_path / "run")
    log.write(Incident.here("skipped_step", "step 7: loss nan", 7, phase="data", details={"loss": math.nan, "samples": [4]}))
    log.write(Incident("hang", "rank 1 did not arrive", rank=1, host="node-b"))
    with log.path.open("a") as file:
        file.write('{"kind": "torn')
    first, second = read_incidents(tmp_path / "run")
    assert (first["rank"], first["pid"], first["host"], first["step"]) == (3, os.getpid(), socket.gethostname(), 7)
    assert math.isnan(first["details"]["loss"]) and first["details"]["samples"] == [4]
    assert (second["host"], second["pid"], second["phase"]) == ("node-b", None, None) and second["time"] >= first["time"]


def write_many(rank: int, world_size: int, folder: str) -> None:
    for number in range(50):
        IncidentLog(Path(folder)).write(Incident("death", "x" * 2000, step=number, rank=rank))


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    run_ranks(3, write_many, str(tmp_path))
    lines = (tmp_path / INCIDENTS).read_text().splitlines()
    assert len(lines) == 150 and {json.loads(line)["rank"] for line in lines} == {0, 1, 2}


def test_a_fault_of_the_disk_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    log = IncidentLog(tmp_path / "file")
    log.write(Incident("hang", "one"))
    log.write(Incident("hang", "two"))
    assert len(caplog.records) == 1 and "only in this log" in caplog.text
    assert list(read_incidents(tmp_path)) == []


def test_incidents_that_a_full_disk_refused_are_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = IncidentLog(tmp_path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:9]))
    log.write(Incident("save_failed", "one"))
    monkeypatch.setattr(os, "write", write)
    log.retry()
    log.retry()
    log.write(Incident("save_failed", "two"))
    assert [each["message"] for each in read_incidents(tmp_path)] == ["one", "two"]


def test_a_retry_that_is_torn_doubles_no_incident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = IncidentLog(tmp_path)
    write = os.write

    def full(descriptor: int, line: bytes) -> int:
        raise OSError(errno.ENOSPC, "full")

    log.write(Incident("save_failed", "zero"))
    monkeypatch.setattr(os, "write", full)
    log.write(Incident("save_failed", "one"))
    log.write(Incident("save_failed", "two"))
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:-20]))
    log.retry()
    monkeypatch.setattr(os, "write", write)
    log.retry()
    assert [each["message"] for each in read_incidents(tmp_path)] == ["zero", "one", "two"]


def test_another_run_moves_the_file_aside(tmp_path: Path) -> None:
    first, second = RunIdentity.new(None), RunIdentity.new(None)
    take_over_metrics(tmp_path, first)
    IncidentLog(tmp_path).write(Incident("hang", "of the first run"))
    take_over_metrics(tmp_path, first)
    assert len(list(read_incidents(tmp_path))) == 1
    take_over_metrics(tmp_path, second)
    assert not list(read_incidents(tmp_path))
    assert "of the first run" in (tmp_path / f"incidents.replaced-{first.id[:8]}.jsonl").read_text()
