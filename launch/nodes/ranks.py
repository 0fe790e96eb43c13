"""The ranks of this machine: forked, asked to save, ended. They die with this process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from ...checkpoint.fence import FENCE, Fence
from ...trainer.watch.folder import AttemptFolder
from .. import forked
from ..torchrun import RANK
from .memory import Assignment

REPEAT_SECONDS = 2.0
"""A request to save and end is sent again so often: a rank ignores it before it trains."""
MOMENT_SECONDS = 0.2
"""Time in which most ranks are gone that were killed."""
KILL_SECONDS = 5.0
"""Time after which people are told of killed ranks that are not gone."""


class LocalRanks:
    """The processes of one attempt on this machine."""

    def __init__(self, assignment: Assignment, launch: str, node: int, root: Path, arguments: Sequence[str]) -> None:
        """Start them. node: this machine's place in the assignment; root: of the watch; arguments: of every rank."""
        here = assignment.nodes[node]
        self._asked = 0.0
        self._processes: dict[int, BaseProcess | subprocess.Popen[bytes]] = {}
        said = AttemptFolder.of(root, assignment.number).path / "said"
        said.mkdir(parents=True, exist_ok=True)
        for local in range(here.processes):
            variables = {
                "RANK": here.first_rank + local,
                "LOCAL_RANK": local,
                "WORLD_SIZE": assignment.world_size,
                "LOCAL_WORLD_SIZE": here.processes,
                "GROUP_RANK": node,
                "GROUP_WORLD_SIZE": len(assignment.nodes),
                "MASTER_ADDR": assignment.host,
                "MASTER_PORT": assignment.port,
                "TORCHELASTIC_RUN_ID": launch,
                "TORCHELASTIC_RESTART_COUNT": assignment.number,
                FENCE: Fence(launch, assignment.term, assignment.number),
                "TORCHELASTIC_ERROR_FILE": said / str(local) / "error.json",
            }
            started = _start({name: str(value) for name, value in variables.items()}, arguments)
            self._processes[here.first_rank + local] = started

    def codes(self) -> dict[int, int | None]:
        """Return exit codes by rank, negative for a signal; None for those that run."""
        return {rank: _code(process) for rank, process in self._processes.items()}

    def ask_to_save(self) -> None:
        """Ask the ranks to save and end after their step, unless that was done a moment ago."""
        if time.monotonic() - self._asked > REPEAT_SECONDS:
            self._asked = time.monotonic()
            self._signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Kill the ranks, stopped ones, too, and wait a moment, in which most are gone."""
        self._signal(signal.SIGKILL)
        deadline = time.monotonic() + MOMENT_SECONDS
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.02)

    def left(self) -> dict[int, int]:
        """Return the process ids of the ranks that are not gone yet, by rank. The others have given their GPUs back."""
        return {rank: process.pid or 0 for rank, process in self._processes.items() if _code(process) is None}

    def _signal(self, number: int) -> None:
        for process in self._processes.values():
            if _code(process) is None and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)


def _start(variables: dict[str, str], arguments: Sequence[str]) -> BaseProcess | subprocess.Popen[bytes]:
    """Start a rank with these variables beside those of this process: forked, where that works."""
    if not forked.can_fork():
        words = [sys.executable, "-u", "-m", RANK, *arguments]
        return subprocess.Popen(words, env={**os.environ, **variables, forked.DIES_WITH_PARENT: "1"})
    context = multiprocessing.get_context(forked.METHOD)
    process = context.Process(target=forked.train_of_node, args=(variables, dict(os.environ), list(arguments)))
    process.start()
    return process


def _code(process: BaseProcess | subprocess.Popen[bytes]) -> int | None:
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
