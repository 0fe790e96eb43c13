"""Ranks that begin with everything imported: forked from a process that imports it once, while the run is being checked.

Python's own fork server does the forking. It is a process that has only imported modules (`preload.py`), so that nothing that
can't be forked (threads, the GPU's driver) is lost on the way. A rank restarted after a failure begins as quickly.
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
import traceback
from collections.abc import Generator, Mapping, Sequence
from multiprocessing import connection, forkserver, resource_tracker

from ..trainer.signals import INTERRUPTED

METHOD = "forkserver"
PRELOADED = "meshloom.launch.preload"


def prepare() -> None:
    """Begin the process to fork from. It ends with this one."""
    # What is left of an agent that was killed is cleared away by a process of Python's, which need not tell.
    with environment_variable("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker"):
        resource_tracker.ensure_running()
    multiprocessing.set_forkserver_preload([PRELOADED])
    forkserver.ensure_running()


@contextlib.contextmanager
def environment_variable(name: str, value: str) -> Generator[None]:
    """A variable of the environment has this value meanwhile."""
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
    """Whether ranks can be forked: tried with a process that uses a GPU as they will. Waits until the imports are done."""
    trial = multiprocessing.get_context(METHOD).Process(target=_try)
    trial.start()
    trial.join()
    return trial.exitcode == 0


def _try() -> None:
    """Fail where a process like this one, forked from a process that has begun to use GPUs, can't."""
    import torch

    from . import preload

    if not preload.MAY_FORK:
        sys.exit(1)
    if torch.cuda.device_count():
        torch.cuda.get_device_properties(0)


def train(environment: Mapping[str, str], arguments: Sequence[str]) -> None:
    """One rank, as `python -m meshloom.launch.rank` with these arguments would be in this environment. Ends the process,
    but for a run that ended as asked.

    What torchrun says of the rank is in this process's environment already.
    """
    from . import preload

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name, value in environment.items():
        if os.environ.get(name) == preload.ENVIRONMENT.get(name):
            os.environ[name] = value
    agent = multiprocessing.parent_process()
    if agent is not None:
        threading.Thread(target=_stop_with, args=(agent.sentinel,), daemon=True).start()
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # which is read when torch is imported, perhaps without it
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # somebody reads the log while it grows: torchrun starts Python with -u
    from .rank import main

    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:  # of which PyTorch would make an end that torchrun waits for for ever
        code = INTERRUPTED
    except Exception:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # the end of a forked process leaves them out
    if agent is not None and not agent.is_alive():  # without whose leave a rank that ended well would not end
        code = code or 128 + signal.SIGTERM
    if code:
        sys.exit(code)


def _stop_with(agent: int) -> None:
    """Ask this rank to stop when its agent, whose sentinel this is, was killed: nobody would hear, or end, it any more."""
    connection.wait([agent])
    os.kill(os.getpid(), signal.SIGTERM)
