"""A run on machines that come and go: its losses are those of a run to which nothing has happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import psutil
import pytest

from meshloom.trainer.watch.incidents import read_incidents
from support.forked_commands import ForkedCommand
from support.ranks import run_ranks
from support.tiny_run import TINY, body

PATIENCE = 600.0  # seconds: twenty, as a rule
HOOK = """
import time
from pathlib import Path
from meshloom.trainer.hooks.base import Hook

class Hold(Hook):
    alone = True
    def __init__(self, file, seconds):
        self.file, self.seconds = Path(file), seconds
    def on_step_begin(self, loop):
        deadline = time.monotonic() + self.seconds
        while self.file.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
"""
STEPS = [*TINY, "trainer.tokens=null", "trainer.steps=120", "trainer.eval_every=0"]


class Machines:
    """Launchers of one run, whose steps take long until `release`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "run"
        (folder / "holding.py").write_text(HOOK)
        (folder / "hold").touch()
        hook = f"trainer.hooks=[{{_target_: holding.Hold, file: {folder / 'hold'}, seconds: 5.0}}]"
        more = ["launch.nodes=1:2", "launch.nproc=1", "launch.join_seconds=0", "launch.check=false", "checkpoint.every=3", hook]
        self.words = [*STEPS, *more, f"output_dir={self.out}"]
        self.started: list[subprocess.Popen[str]] = []

    def start(self) -> subprocess.Popen[str]:
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        variables["PYTHONPATH"] = f"{self.folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        command = [sys.executable, "-m", "meshloom.launch.cli", "train", *self.words]
        log = (self.folder / f"machine-{len(self.started)}.log").open("w")
        self.started.append(ForkedCommand(command, env=variables, stdout=log, stderr=log))
        return self.started[-1]

    def release(self) -> None:
        (self.folder / "hold").unlink()

    def rows(self) -> list[dict[str, Any]]:
        file = self.out / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [row for row in rows if "loss" in row]

    def ranks(self) -> list[int]:
        file = self.out / "ranks.json"
        return [row["pid"] for row in json.loads(file.read_text())] if file.exists() else []

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline and any(each.poll() is None for each in self.started), self.said()
            time.sleep(0.05)

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


@pytest.fixture
def machines(tmp_path: Path) -> Generator[Machines]:
    found = Machines(tmp_path)
    yield found
    for launcher in found.started:
        if launcher.poll() is None:
            for child in psutil.Process(launcher.pid).children(recursive=True):
                child.kill()
            launcher.kill()
        launcher.wait()


@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_machines_come_and_go_and_the_losses_stay_the_same(machines: Machines, tmp_path: Path) -> None:
    first = machines.start()
    machines.wait(lambda: len(machines.rows()) > 0)
    alone = machines.ranks()
    second = machines.start()
    machines.wait(lambda: len(machines.ranks()) == 2)
    before = len(machines.rows())
    machines.wait(lambda: len(machines.rows()) > before)
    both = machines.ranks()
    assert alone[0] not in both
    (agent,) = psutil.Process(first.pid).children()
    agent.kill()  # it leads, and has rank 0
    machines.wait(lambda: not set(machines.ranks()) & set(both))
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in both)
    machines.release()
    assert second.wait(PATIENCE) == 0, machines.said()
    assert first.wait(PATIENCE) == 137
    run_ranks(1, body, [*STEPS, "checkpoint.every=0", f"output_dir={tmp_path / 'undisturbed'}"])
    undisturbed = [json.loads(line) for line in (tmp_path / "undisturbed" / "metrics.jsonl").read_text().splitlines()]
    expected = {row["step"]: row["loss"] for row in undisturbed if "loss" in row}
    found = {row["step"]: row["loss"] for row in machines.rows()}
    assert len(expected) == 120 and found == pytest.approx(expected, rel=1e-9)
    said = [row["message"] for row in read_incidents(machines.out)]
    assert sum("joins at the end of the step" in text for text in said) == 1 and "Traceback" not in machines.said()
    assert sum("is lost: its launcher does not answer" in text for text in said) == 1
    assert (machines.out / ".nodes" / "by-hand" / "outcome").read_text() == "0"
