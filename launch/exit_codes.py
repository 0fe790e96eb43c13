"""Exit codes of a run. A code of 128 + n says that signal n ended the process that failed first, as a shell gives it."""

from __future__ import annotations

from ..trainer.signals import DIVERGED as DIVERGED

SUCCESS = 0
FAILED = 1
"""A rank raised an exception."""
BAD_CONFIG = 2
"""The config, the data or the folders can't be used as they are: starting again changes nothing."""
HUNG = 75
"""A rank did not go on, and the run was ended for it. Starting again may help (`EX_TEMPFAIL` of sysexits.h)."""
NO_PROGRESS = 76
"""Attempts fail without any progress: starting again would repeat it."""
TOO_FEW_MACHINES = 78
"""Fewer machines than the run needs came in time. Another start would wait for them, too. (77 is DIVERGED.)"""
