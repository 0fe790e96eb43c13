"""Settings of this process in Linux, and the state of others: who may look into it, when it ends, whether it runs."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, -1


def control_process(option: int, value: int) -> None:
    """Call Linux's prctl for this process; do nothing where there is none."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value & (2**64 - 1)), 0, 0, 0)


def get_signal_when_parent_dies(number: int) -> None:
    """Have the system send this process a signal once its parent is dead. It comes to stopped processes, too (prctl(2))."""
    control_process(PR_SET_PDEATHSIG, number)


def process_state(pid: int) -> str:
    """Return Linux's letter for a process's state; "X" if it is gone, "t" also where a debugger follows a process that runs."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "X"
    letter, tracer = re.search(r"^State:\s*(\S)", text, re.MULTILINE), re.search(r"^TracerPid:\s*(\d+)", text, re.MULTILINE)
    if letter is None or letter[1] in "XZ":
        return "X" if letter is None else letter[1]
    return letter[1] if tracer is None or tracer[1] == "0" else "t"
