"""Start torchrun on this machine, hand the cluster's signals to the workers, and end as they end.

    python -m meshloom.launch.torchrun <torchrun's own arguments>

torchrun answers SIGTERM by ending its workers within seconds, and SIGUSR1 by dying. A worker that is to save a last
checkpoint needs neither: here the signals go to the workers themselves, which finish their step, agree, save and end.
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

import psutil

from ..trainer.signals import INTERRUPTED, STOPPING, show_cursor

RANK = "meshloom.launch.rank"
"""The module that a rank runs."""
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL_SECONDS = 0.2
KILL_SECONDS = 5.0
REPEAT_SECONDS = 5.0  # a worker that had not installed its handler yet hears it the next time


class PreparedAgent:
    """An agent that imports what it and the ranks need, seconds on some machines, while its launcher still checks the run."""

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        """variables: the environment, as far as it is known; this process's unless given."""
        listening, self._pipe = os.pipe()
        command = [sys.executable, "-m", "meshloom.launch.agent", "--when-told", str(listening)]
        # A session of its own, so that a terminal's Ctrl-C reaches the launcher alone.
        self.process = subprocess.Popen(command, env=variables, pass_fds=(listening,), start_new_session=True)
        os.close(listening)
        self._told = False

    def tell(self, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Let it run torchrun with these. Whoever asks is to wait for the process, or to end it."""
        self._told = True
        with contextlib.suppress(BrokenPipeError), os.fdopen(self._pipe, "wb") as pipe:  # it has died: its code says so
            pipe.write(json.dumps({"arguments": list(arguments), "environment": dict(environment)}).encode())
        return self.process

    def dismiss(self) -> None:
        """Nothing is to be run, if nothing was told: it has touched nothing, so it may be killed."""
        if not self._told:
            self._told = True
            os.close(self._pipe)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # and what it would have forked ranks from
            self.process.wait()


class TorchRun:
    """One torchrun agent as a child process."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        self._asked = 0
        self._last = signal.SIGTERM
        self._at_once = False
        self._agent: subprocess.Popen[bytes] | None = None

    def run(self, prepared: PreparedAgent | None = None) -> int:
        """Start it and wait. Returns its exit code: 0, or that of the worker that failed first; 130 after a second Ctrl-C.

        prepared: an agent to use, in place of one started now.
        """
        previous: dict[signal.Signals, Any] = {number: signal.signal(number, self._ask) for number in FORWARDED}
        try:
            variables = environment(self._arguments)
            agent = PreparedAgent(variables) if prepared is None else prepared
            self._agent = agent.process
            agent.tell(self._arguments, variables)
            return self._wait(self._agent)
        finally:
            if self._agent is not None and self._agent.poll() is None:
                self._agent.terminate()
                self._agent.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether a signal came, so that the workers were told to stop."""
        return self._asked > 0

    @property
    def number(self) -> signal.Signals:
        """The last signal that came."""
        return self._last

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self._asked += 1
        self._last = signal.Signals(number)
        if number == signal.SIGINT and self._asked > 1:
            self._at_once = True
        elif number == signal.SIGINT:
            print(STOPPING, file=sys.stderr)

    def _wait(self, agent: subprocess.Popen[bytes]) -> int:
        told = 0.0
        while (code := agent.poll()) is None:
            if self._at_once:
                _kill(agent)
                show_cursor()
                return INTERRUPTED
            if self._asked and time.monotonic() - told > REPEAT_SECONDS and self._tell(agent.pid):
                told = time.monotonic()
            time.sleep(POLL_SECONDS)
        return code if code >= 0 else 128 - code

    @staticmethod
    def _tell(agent: int) -> bool:
        """Send SIGUSR1 to the workers. Returns whether there were any."""
        try:
            workers = _workers(agent)
            for worker in workers:
                worker.send_signal(signal.SIGUSR1)
        except psutil.Error:  # it ended meanwhile
            return False
        return bool(workers)


def _kill(agent: subprocess.Popen[bytes]) -> None:
    """End torchrun and its workers now: asked to do so itself, it would let them save first.

    A worker's own children are left alone: its writer ends with it, and a keeper keeps the last snapshot for the next run.
    """
    ending: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        agent.send_signal(signal.SIGSTOP)  # it starts no other worker in place of a killed one
        workers = _workers(agent.pid)
        for worker in workers:
            with contextlib.suppress(psutil.Error):
                worker.kill()
        ending = [*workers, *psutil.Process(agent.pid).children()]  # Python's own among them end with the agent
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + KILL_SECONDS
    while any(_runs(process) for process in ending) and time.monotonic() < deadline:  # until their GPUs are free
        time.sleep(POLL_SECONDS / 10)


def _workers(agent: int) -> list[psutil.Process]:
    """An agent's ranks: forked on its behalf by Python's fork server, or its own children."""
    workers: list[psutil.Process] = []
    for child in psutil.Process(agent).children():
        if any("multiprocessing.forkserver" in word for word in child.cmdline()):
            workers += child.children()
        elif "RANK" in child.environ():
            workers.append(child)
    return workers


def _runs(process: psutil.Process) -> bool:
    """Whether it is there, and not only because nobody has waited for it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def environment(arguments: Sequence[str]) -> dict[str, str]:
    """This process's environment with what the workers need: a fair share of the cores, and restarts that find each other."""
    variables = with_share(next((int(value) for value in _values(arguments, "--nproc-per-node") if value.isdigit()), 1))
    if any(value != "0" for value in _values(arguments, "--max-restarts")):
        # Restarted workers would read the first attempt's addresses from the agent's own store.
        variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return variables


def with_share(workers: int) -> dict[str, str]:
    """This process's environment with a fair share of the cores for so many workers, unless it says how many each gets."""
    share = max(1, len(os.sched_getaffinity(0)) // workers)
    return {"OMP_NUM_THREADS": str(share), **os.environ}


def _values(arguments: Sequence[str], flag: str) -> list[str]:
    return [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{flag}=")]


def main(argv: Sequence[str]) -> int:
    """Start torchrun with these arguments (written `--flag=value`) and wait for it."""
    return TorchRun(argv).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
