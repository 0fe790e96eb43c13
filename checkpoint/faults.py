"""The seam at which tests break things. Every boundary of a save passes through `reach`; without a hook it does nothing.

A boundary is a moment at which a crash leaves a different disk behind: before and after each write, fsync, rename. Its
name says which, for example `data.write.before`. The crash matrix runs a save once to list the boundaries it passes,
then once more per boundary and kind of fault.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

Hook = Callable[[str, int], int]
VARIABLE = "MESHLOOM_CHECKPOINT_FAULT"

_hook: Hook | None = None


def reach(boundary: str, amount: int = 0) -> int:
    """Say that this moment has come. `amount` is the number of bytes about to be written; returns how many may be.

    A hook may end the process, raise OSError, or return less than `amount` (a short write).
    """
    return amount if _hook is None else _hook(boundary, amount)


def install(hook: Hook | None) -> None:
    """Call `hook(boundary, amount)` at every boundary of this process from now on; None takes it away."""
    global _hook
    _hook = hook


def scripted(script: str) -> Hook:
    """The hook that a text asks for.

    `<kind>:<n>` acts at the n-th boundary, `<kind>:<name>` at the first of that name; `log:<path>` writes their names down.

    Data are written by the page, so that there are more boundaries. Kinds: kill (SIGKILL), enospc, eio (OSError), short
    (half of the bytes are written, once), hang (for an hour).
    """
    kind, _, rest = script.partition(":")
    if kind == "log":

        def log(boundary: str, amount: int) -> int:
            descriptor = os.open(rest, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(descriptor, f"{boundary} {amount}\n".encode())
            os.close(descriptor)
            return _page(boundary, amount)

        return log
    numbered = rest.isdigit()
    left = int(rest) if numbered else 1

    def act(boundary: str, amount: int) -> int:
        nonlocal left
        if numbered or boundary == rest:
            left -= 1
            if left == 0:
                return strike(kind, boundary, _page(boundary, amount))
        return _page(boundary, amount)

    return act


def _page(boundary: str, amount: int) -> int:
    return min(amount, 4096) if boundary == "data.write.before" else amount


def strike(kind: str, boundary: str, amount: int) -> int:
    """Do what the kind of fault says, now."""
    import errno

    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind in ("enospc", "eio"):
        code = errno.ENOSPC if kind == "enospc" else errno.EIO
        raise OSError(code, f"{os.strerror(code)} (injected at {boundary})")
    if kind == "hang":
        time.sleep(3600)
    assert kind in ("short", "hang"), kind
    return amount // 2


def install_from_environment() -> None:
    """For a process that a test can reach only through its environment: the writer and the keeper."""
    script = os.environ.get(VARIABLE)
    if script:
        install(scripted(script))
