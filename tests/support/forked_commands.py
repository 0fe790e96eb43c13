"""Commands of Meshloom in processes forked from that of the tests: each would import PyTorch for seconds if it were started.

process = ForkedCommand([sys.executable, "-m", "meshloom.launch.cli", "train", …], cwd=folder, stderr=subprocess.PIPE)

It is a `Popen` in all else: a process with its own streams, environment, signals and exit code. The agent that the command
starts is forked from it, and the agent's fork server from that. So a run has the same tree of processes as a user's. What
differs: all of them hash strings alike, as interpreters of their own do not. Where there is a GPU all are started: forks of a
process that has asked for GPUs can't use them.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from typing import Any, NoReturn

import torch

from meshloom import launch
from meshloom.launch import forked

_spawn = util.spawnv_passfds
"""Starts the fork server, and the tracker of resources, as Python does."""


class ForkedCommand(subprocess.Popen[Any]):
    """A process. It begins as a fork of this one where Python is to run a module of Meshloom's launcher, or a program (-c)."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any) -> None:
        """As Popen. env: the environment; default: this process's."""
        run = None
        if list(command[:2]) == [sys.executable, "-c"]:
            run = _run_program
        elif list(command[:2]) == [sys.executable, "-m"] and command[2].startswith("meshloom.launch."):
            run = _run_module
        if run is not None and not torch.cuda.is_available():
            variables, kept = dict(os.environ if env is None else env), options.get("pass_fds", ())
            # The streams, the folder and the session are those of the child when this is called, and it never returns.
            options["preexec_fn"] = lambda: _become(lambda: run(*command[2:]), kept, variables)
        super().__init__(command, env=env, **options)


def run_forked(command: Sequence[str], timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run` does with what it prints captured. options: of Popen."""
    with ForkedCommand(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(list(command), process.returncode, out, errors)


def _become(program: Callable[[], object], kept: Iterable[int], variables: Mapping[str, str]) -> NoReturn:
    """Do in this forked process what a new interpreter would, and end as one. kept: descriptors besides the streams."""
    code: object = 1
    interrupted = False
    try:
        _begin_anew(kept, variables)
        program()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        traceback.print_exc()
        interrupted = isinstance(error, KeyboardInterrupt)
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
    with contextlib.suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if interrupted:  # nobody caught it: Python then ends by the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code if isinstance(code, int) else int(code is not None))


def _begin_anew(kept: Iterable[int], variables: Mapping[str, str]) -> None:
    """Leave what belongs to the parent: its files, signals, log, children, and what it does at its end."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if descriptor not in {0, 1, 2, nowhere, *kept}:  # objects that hold it may close it, so the number stays taken
            os.dup2(nowhere, descriptor, inheritable=False)
    faulthandler.disable()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them from its start on; `Popen` has undone that
        signal.signal(number, signal.SIG_IGN)
    threading.excepthook, sys.unraisablehook = threading.__excepthook__, sys.__unraisablehook__  # pytest keeps what they get
    os.environ.clear()
    os.environ.update(variables)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    for log in (logging.getLogger(), logging.getLogger("meshloom")):
        log.handlers.clear()
    folders = [str(Path.cwd()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    tempfile.tempdir = None
    _forget_processes()
    gc.freeze()
    gc.enable()
    util.spawnv_passfds = _fork_server  # type: ignore[assignment]
    subprocess.Popen = ForkedCommand  # type: ignore[assignment,misc]


def _forget_processes() -> None:
    """Have `multiprocessing` know none of the parent's processes, as in forks of its own, nor a fork server or a tracker."""
    atexit._clear()
    util._finalizer_registry.clear()
    atexit.register(util._exit_function)
    multiprocessing.process._children.clear()
    multiprocessing.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]
    server, tracker = forkserver._forkserver, resource_tracker._resource_tracker
    server._forkserver_pid = server._forkserver_address = server._forkserver_alive_fd = server._inherited_fds = None
    tracker._pid = tracker._fd = None
    forked.can_fork.cache_clear()
    for name in forked.PRELOADED:  # modules that do something when they are imported
        sys.modules.pop(name, None)
        vars(launch).pop(name.rpartition(".")[2], None)


def _run_module(name: str, *arguments: str) -> None:
    """Run a module as `python -m` does."""
    sys.argv = ["-m", *arguments]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the parent may have imported it
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_program(text: str, *arguments: str) -> None:
    """Run a program as `python -c` does."""
    sys.argv = ["-c", *arguments]
    exec(text, {"__name__": "__main__"})


def _fork_server(path: str, arguments: Sequence[str], kept: Sequence[int]) -> int:
    """Fork the fork server where Python would start it. Return its process id."""
    program = arguments[-1]
    if "multiprocessing.forkserver" not in program:
        return _spawn(path, arguments, kept)
    process = os.fork()
    if process:
        return process
    _name_this_process("multiprocessing.forkserver")
    _become(lambda: _run_program(program), kept, dict(os.environ))


def _name_this_process(name: str) -> None:
    """Write a name over this process's command line, by which the launcher finds it.

    A longer one goes on where the variables of the environment were: in this process they have been set anew, elsewhere.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5), which counts from 1
    text = f"{name}\0".encode().ljust(end - begin, b"\0")
    ctypes.memmove(begin, text, len(text))
