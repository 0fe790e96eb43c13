"""Notice the death of the process that started this one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from ..trainer.watch.process import get_signal_when_parent_dies

PARENT_SECONDS = 0.25
"""Time between two looks at whether the launcher lives."""


def when_launcher_dies(action: Callable[[], None]) -> Callable[[], None]:
    """Call `action` in a thread once the launcher, this process's parent, has died, however. Return what calls that off.

    A stopped process goes on then, so that the thread runs.
    """
    get_signal_when_parent_dies(signal.SIGCONT)
    launcher, over = os.getppid(), threading.Event()

    def follow() -> None:
        while os.getppid() == launcher:
            if over.wait(PARENT_SECONDS):
                return
        action()

    threading.Thread(target=follow, daemon=True, name="launcher").start()
    return over.set
