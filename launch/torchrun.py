"""Start torchrun on this machine, forward signals to its workers, and return their exit code.

    python -m meshloom.launch.torchrun <torchrun's own arguments>

torchrun ends its workers within seconds of SIGTERM, and dies of SIGUSR1. Neither lets a worker save a last checkpoint. So the
signals are sent to the workers themselves, which finish their step, agree, save and end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from ..config.lazy import psutil
from ..config.words import counted
from ..trainer.signals import INTERRUPTED, STOPPING, show_cursor

RANK = "meshloom.launch.rank"
"""The module that a rank runs."""
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL_SECONDS = 0.2
KILL_SECONDS = 5.0
REPEAT_SECONDS = 5.0  # sent again, for a worker that had not installed its handler yet


def say_starting(processes: int, machines: int = 1) -> None:
    """Say on stderr that processes are started, and what takes its time until they say something themselves."""
    here = " on this machine" if machines > 1 else ""
    work = "they import PyTorch, prepare the data and build the model"
    print(f"starting {counted(processes, 'process')}{here}: {work} …", file=sys.stderr, flush=True)


class PreparedAgent:
    """A torchrun agent started early: it imports what it and the ranks need, for seconds, while the run is still checked."""

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        """variables: the environment known so far; default: this process's."""
        listening, self._pipe = os.pipe()
        command = [sys.executable, "-m", "meshloom.launch.agent", "--when-told", str(listening)]
        # A session of its own, so that a terminal's Ctrl-C reaches only the launcher.
        self.process = subprocess.Popen(command, env=variables, pass_fds=(listening,), start_new_session=True)
        os.close(listening)
        self._told = False

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start torchrun in it with these arguments. The caller must wait for the returned process, or end it."""
        self._told = True
        # A broken pipe: the agent has died; its exit code is reported.
        with contextlib.suppress(BrokenPipeError), os.fdopen(self._pipe, "wb") as pipe:
            pipe.write(json.dumps({"arguments": list(arguments), "environment": dict(environment)}).encode())
        return self.process

    def dismiss(self) -> None:
        """Kill it, unless torchrun was started: so far it has only imported modules."""
        if not self._told:
            self._told = True
            os.close(self._pipe)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # its fork server too
            self.process.wait()


class TorchRun:
    """One agent as a child process: torchrun's, or that of a machine in a run on several (`nodes/agent.py`)."""

    def __init__(self, arguments: Sequence[str], workers: int | None = None) -> None:
        """workers: of a machine in a run on several, where the arguments are not torchrun's."""
        self._arguments, self._workers = list(arguments), workers
        self._requests = 0
        self._last = signal.SIGTERM
        self._at_once = False
        self._agent: subprocess.Popen[bytes] | None = None

    def run(self, prepared: PreparedAgent | None = None) -> int:
        """Start it and wait. Return its exit code: 0, or that of the worker that failed first; 130 after a second Ctrl-C.

        prepared: an agent started earlier; default: one started now
        """
        previous: dict[signal.Signals, Any] = {number: signal.signal(number, self._on_signal) for number in FORWARDED}
        try:
            variables = environment(self._arguments) if self._workers is None else with_share(self._workers)
            agent = PreparedAgent(variables) if prepared is None else prepared
            self._agent = agent.process
            agent.start(self._arguments, variables)
            return self._wait(self._agent)
        finally:
            if self._agent is not None and self._agent.poll() is None:
                self._agent.terminate()
                self._agent.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)

    @property
    def stop_requested(self) -> bool:
        """Return whether a signal was received, so that the workers were asked to stop."""
        return self._requests > 0

    @property
    def number(self) -> signal.Signals:
        """The last signal received."""
        return self._last

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._requests += 1
        self._last = signal.Signals(number)
        if number == signal.SIGINT and self._requests > 1:
            self._at_once = True
        elif number == signal.SIGINT:
            print(STOPPING, file=sys.stderr)

    def _wait(self, agent: subprocess.Popen[bytes]) -> int:
        requested = 0.0
        while (code := agent.poll()) is None:
            if self._at_once:
                _kill(agent)
                show_cursor()
                return INTERRUPTED
            if self._requests and time.monotonic() - requested > REPEAT_SECONDS:
                if self._request_stop(agent.pid):
                    requested = time.monotonic()
                elif self._workers is not None:  # it waits for other machines: it has nothing to save
                    agent.terminate()
            time.sleep(POLL_SECONDS)
        return code if code >= 0 else 128 - code

    @staticmethod
    def _request_stop(agent: int) -> bool:
        """Send SIGUSR1 to the workers. Return whether there were any."""
        try:
            workers = _workers(agent)
            for worker in workers:
                worker.send_signal(signal.SIGUSR1)
        except psutil.Error:  # the agent has ended meanwhile
            return False
        return bool(workers)


def _kill(agent: subprocess.Popen[bytes]) -> None:
    """Kill torchrun and its workers now; SIGTERM would let the workers save first.

    A worker's own children are left alone: its writer ends with it, and a keeper holds the last snapshot for the next run.
    """
    ending: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        agent.send_signal(signal.SIGSTOP)  # so that it does not restart killed workers
        workers = _workers(agent.pid)
        for worker in workers:
            with contextlib.suppress(psutil.Error):
                worker.kill()
        ending = [*workers, *psutil.Process(agent.pid).children()]  # Python's helper processes end with the agent
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + KILL_SECONDS
    while any(_runs(process) for process in ending) and time.monotonic() < deadline:  # wait until their GPUs are free
        time.sleep(POLL_SECONDS / 10)


def _workers(agent: int) -> list[psutil.Process]:
    """Return an agent's ranks: children of its fork server, or its own."""
    workers: list[psutil.Process] = []
    for child in psutil.Process(agent).children():
        if any("multiprocessing.forkserver" in word for word in child.cmdline()):
            workers += child.children()
        elif "RANK" in child.environ():
            workers.append(child)
    return workers


def _runs(process: psutil.Process) -> bool:
    """Return whether a process runs, that is, exists and is no zombie."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def environment(arguments: Sequence[str]) -> dict[str, str]:
    """Return the workers' environment: this process's, with a share of the cores and what restarts need to rendezvous."""
    variables = with_share(next((int(value) for value in _values(arguments, "--nproc-per-node") if value.isdigit()), 1))
    if any(value != "0" for value in _values(arguments, "--max-restarts")):
        # Restarted workers would read the first attempt's addresses from the agent's own store.
        variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return variables


def with_share(workers: int) -> dict[str, str]:
    """Return this process's environment with OMP_NUM_THREADS, if not set, as an equal share of the cores."""
    share = max(1, len(os.sched_getaffinity(0)) // workers)
    return {"OMP_NUM_THREADS": str(share), **os.environ}


def _values(arguments: Sequence[str], flag: str) -> list[str]:
    return [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{flag}=")]


def main(argv: Sequence[str]) -> int:
    """Start torchrun with these arguments (written `--flag=value`), wait, and return its exit code."""
    return TorchRun(argv).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
