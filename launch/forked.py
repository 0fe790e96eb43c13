"""Fork ranks from a process that imports all modules once, while the run is being checked.

Python's own fork server does the forking. It has only imported modules (`preload.py`), so it holds nothing that a fork would
break, such as threads or the GPU driver. A rank restarted after a failure starts as quickly.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.process import BaseProcess

from ..trainer.signals import INTERRUPTED
from ..trainer.watch.process import get_signal_when_parent_dies, process_state

METHOD = "forkserver"
PRELOADED = ["meshloom.launch.dies_with_parent", "meshloom.launch.preload"]
ORPHAN_SECONDS = 60.0
"""Time for a rank to finish its step and save when its agent was killed; then it ends at once."""
LOOK_SECONDS = 1.0
"""Time between two looks of a rank at its agent."""
STOPPED_SECONDS = 10.0
"""A machine whose agent is stopped for so long is lost to the others (`ANSWER_SECONDS` of `nodes/wire.py`)."""
DIES_WITH_PARENT = "MESHLOOM_DIES_WITH_PARENT"
"""Environment variable of a rank that is not forked, and has to end at once when its parent does."""


def prepare() -> None:
    """Start the fork server. It ends with this process."""
    # Python's resource tracker cleans up after a killed agent; its warning helps nobody.
    with environment_variable("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker"):
        resource_tracker.ensure_running()
    multiprocessing.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


@contextlib.contextmanager
def environment_variable(name: str, value: str) -> Generator[None]:
    """Set an environment variable within a `with` block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@functools.cache
def can_fork() -> bool:
    """Return whether ranks can be forked, by a trial process that uses a GPU as they will. Waits for the imports."""
    trial = multiprocessing.get_context(METHOD).Process(target=_try)
    trial.start()
    trial.join()
    return trial.exitcode == 0


def _try() -> None:
    """Exit with an error if a forked process can't use the GPUs."""
    import torch

    from . import preload

    if not preload.MAY_FORK:
        sys.exit(1)
    if torch.cuda.device_count():
        torch.cuda.get_device_properties(0)


def train_of_node(variables: Mapping[str, str], environment: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Run one rank of a run on several machines, with these variables of its own: see `train`.

    It ends at once when its agent does. To save would end the whole run; the other machines go on from what is saved.
    """
    os.environ.update(variables)
    train({**environment, **variables}, arguments, orphan_seconds=0.0)


def train(environment: Mapping[str, str], arguments: Sequence[str], orphan_seconds: float = ORPHAN_SECONDS) -> None:
    """Run one rank as `python -m meshloom.launch.rank` with these arguments and environment. Exits the process on failure.

    The variables that torchrun sets for the rank are already in this process's environment.

    orphan_seconds: for the rank to save after its agent was killed
    """
    from . import preload

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name, value in environment.items():
        if os.environ.get(name) == preload.ENVIRONMENT.get(name):
            os.environ[name] = value
    agent = end_with_agent(orphan_seconds)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch reads it on import, which was before it was set
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # as with -u, with which torchrun starts Python
    from .rank import main

    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:  # PyTorch would end in a way that torchrun waits for forever
        code = INTERRUPTED
    except Exception:
        from .once import is_first

        told = traceback.format_exc()
        if is_first(told):
            print(told, file=sys.stderr, end="")
        code = 1
    atexit._run_exitfuncs()  # a forked process does not run them at its end
    if agent is not None and not agent.is_alive():  # a rank that ended well waits for its agent
        code = code or 128 + signal.SIGTERM
    if code:
        sys.exit(code)


def end_with_agent(seconds: float) -> BaseProcess | None:
    """Have this rank end when its agent was killed, also while it is stopped: it would hold its GPU. Return the agent.

    seconds: for the rank to save; 0: it is killed at once
    """
    agent = multiprocessing.parent_process()
    if agent is not None:
        # The fork server, this rank's parent, dies with the agent. A stopped rank has no thread that runs, so it goes on for
        # the time that it has to save.
        get_signal_when_parent_dies(signal.SIGCONT if seconds else signal.SIGKILL)
        assert agent.pid is not None

        def is_gone() -> bool:
            return bool(connection.wait([agent.sentinel], LOOK_SECONDS))

        threading.Thread(target=_stop_with, args=(agent.pid, is_gone, seconds), daemon=True).start()
    return agent


def end_with_parent() -> None:
    """Have this rank, which is not forked, killed with its agent, its parent; it also ends where that is stopped."""
    get_signal_when_parent_dies(signal.SIGKILL)
    agent = os.getppid()

    def is_gone() -> bool:
        time.sleep(LOOK_SECONDS)
        return os.getppid() != agent

    threading.Thread(target=_stop_with, args=(agent, is_gone, 0.0), daemon=True).start()


def _stop_with(agent: int, is_gone: Callable[[], bool], seconds: float) -> None:
    """Ask this rank to stop when its agent was killed, and end it later: nothing else would.

    A machine whose agent is stopped is lost to the others, who go on without its ranks: these end, too.
    """
    stopped = 0.0
    while not is_gone():
        stopped = stopped + LOOK_SECONDS if process_state(agent) == "T" else 0.0
        if not seconds and stopped > STOPPED_SECONDS:
            who = f"rank {os.environ.get('RANK')} ends: its agent (pid {agent})"
            os.write(2, f"{who} is stopped, and other machines go on without it\n".encode())
            os._exit(128 + signal.SIGTERM)
    if seconds:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)  # it may hang in a collective, where it never looks at the request
    os._exit(128 + signal.SIGTERM)
