"""Imported by a fork server before all else: it is killed with the process that started it, also while it is stopped."""

from __future__ import annotations

import signal

from ..trainer.watch.process import get_signal_when_parent_dies

get_signal_when_parent_dies(signal.SIGKILL)
