"""Python stacks of other processes: by py-spy where it is installed, of running ranks also by a signal.

A rank writes its own stack when it gets `STACK_SIGNAL`. A stopped process can't; py-spy reads its memory instead
(pip install 'meshloom[watch]').
"""

from __future__ import annotations

import contextlib
import itertools
import linecache
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from ...trainer.watch.rank import STACK_SIGNAL

PY_SPY_SECONDS = 4.0
SIGNAL_SECONDS = 0.5
FRAMES = 4
_OWN = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+)(?: in (?P<name>.+))?')
_PY_SPY = re.compile(r"^\s+(?P<name>\S.*?) \((?P<file>[^()]+):(?P<line>\d+)\)$")
_COMPILER = re.compile(r"torch/_dynamo/|torch/_inductor/|/triton/|cutlass|cpp_extension")
_IDLE = (
    "subproc_pool.py",  # Inductor's reader of its workers
    "torch/_dynamo/eval_frame.py",  # encloses compiled functions, and those that are not to be compiled, such as FSDP2's
    "torch/_dynamo/external_utils.py",
    "torch/_inductor/output_code.py",  # runs a graph that is compiled
    "torch/_inductor/utils.py",
    "torch/_inductor/runtime/triton_heuristics.py",
    "/triton/runtime/",  # launches a kernel: what compiles it stands in triton/compiler
    "/triton/backends/nvidia/driver.py",
    "/triton/backends/amd/driver.py",
)
"""Files of compilers that stand in stacks while none compiles: a compiler at work has others besides."""
_WAITS = re.compile(
    r"\bwait\w*\(|\.item\(\)|\.tolist\(\)|synchronize\(|all_reduce|all_gather|all_to_all|broadcast|barrier|recv\("
)
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "torch/distributed/_functional_collectives.py")
_MESHLOOM = f"{Path(__file__).parents[2]}{os.sep}"
_SAVING = f"{_MESHLOOM}checkpoint{os.sep}"
_AGREEMENT = ("control.py", "_await_key")
"""File and function in which the ranks of a save wait for one another."""
_WRITING = ("writer.py", "_answer")
"""File and function in which a save waits for its own writer."""


@dataclass(frozen=True)
class Stack:
    """The innermost Python frames of a process's main thread.

    told        "file:line name < …": the innermost frame, then those outside of PyTorch, and by what they were read
    collective  whether it waits in a collective, for the device, or within a save for other ranks
    compiles    whether a compiler is at work in any thread: autograd's own compiles the backward pass
    """

    told: str
    collective: bool
    compiles: bool


def take_stack(pid: int, file: Path, *, stopped: bool) -> Stack | None:
    """Read the stack of a rank; None if nothing can.

    file: into which the rank writes its own; stopped: whether its process is stopped, so that it can't
    """
    if not stopped and (text := _signalled(pid, file)):
        return parse_own(text)
    tool = shutil.which("py-spy")
    if tool is None:
        return None
    command = [tool, "dump", "--nonblocking", "--full-filenames", "--pid", str(pid)]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        found = subprocess.run(command, capture_output=True, text=True, timeout=PY_SPY_SECONDS, check=False)
        return parse_py_spy(found.stdout)
    return None


def _signalled(pid: int, file: Path) -> str:
    """Ask a rank for its stack, and return what it has written within half a second."""
    try:
        before = file.stat().st_size  # no file: the rank does not handle the signal yet, and would die of it
        os.kill(pid, STACK_SIGNAL)
    except OSError:
        return ""
    deadline, text = time.monotonic() + SIGNAL_SECONDS, ""
    while time.monotonic() < deadline:
        time.sleep(0.02)
        after = file.read_bytes()[before:].decode(errors="replace")
        if after and after == text:  # it has not grown since
            break
        text = after
    return text


def parse_own(text: str) -> Stack | None:
    """Parse what Python's faulthandler has written: the frames of the current thread, which is the main thread."""
    parts = re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.MULTILINE)
    heads = re.findall(r"^(Current thread|Thread) .*$", text, flags=re.MULTILINE)
    if not heads:
        return None
    number = heads.index("Current thread") if "Current thread" in heads else len(heads) - 1
    frames = [(m["file"], int(m["line"]), m["name"] or "?") for m in _OWN.finditer(parts[number + 1])]
    return _stack(frames, "", text)


def parse_py_spy(text: str) -> Stack | None:
    """Parse what `py-spy dump` has printed, of the main thread."""
    threads = re.split(r"^Thread ", text, flags=re.MULTILINE)[1:]
    main = next((thread for thread in threads if "MainThread" in thread.partition("\n")[0]), threads[0] if threads else "")
    frames = [(m["file"], int(m["line"]), m["name"]) for line in main.splitlines() if (m := _PY_SPY.match(line))]
    return _stack(frames, " (py-spy)", text)


def _compiles(text: str) -> bool:
    """Return whether a frame of any thread belongs to a compiler. What stands in stacks while none compiles does not count."""
    return any(_COMPILER.search(line) and not any(file in line for file in _IDLE) for line in text.splitlines())


def _of_torch(file: str) -> bool:
    """Return whether a file is of PyTorch. Meshloom has folders named torch, too, and its checkout may hold the environment."""
    within = file.removeprefix(_MESHLOOM)
    return "/torch/" in within and (within == file or "/site-packages/" in within)


def _stands_in(text: str, place: tuple[str, str]) -> bool:
    """Return whether a thread is in this function. place: file and function"""
    return any(all(word in row for word in place) for row in text.splitlines())


def _stack(frames: list[tuple[str, int, str]], source: str, text: str) -> Stack | None:
    """Judge the frames of the main thread, innermost first. text: of all threads."""
    if not frames:
        return None
    own = [frame for frame in frames[1:] if not _of_torch(frame[0]) and "/multiprocessing/" not in frame[0]]
    told = " < ".join(f"{Path(file).name}:{line} {name}" for file, line, name in [frames[0], *own[: FRAMES - 1]])
    file, line, _ = frames[0]
    waits = "torch/distributed/" in file or bool(_WAITS.search(linecache.getline(file, line)))
    # Tensor parallelism waits in an operator of torch.
    within = itertools.takewhile(lambda frame: _of_torch(frame[0]), frames)
    waits |= any(frame[0].endswith(_COLLECTIVES) for frame in within)
    # A save in the background waits in a thread of its own. If another save is still written, the others wait for this rank.
    saves = any(frame[0].startswith(_SAVING) for frame in frames)
    waits |= saves and _stands_in(text, _AGREEMENT) and not _stands_in(text, _WRITING)
    return Stack(told + source, waits, _compiles(text))
