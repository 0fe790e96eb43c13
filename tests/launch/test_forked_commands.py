"""Commands that tests fork do what the same commands do in an interpreter of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.forked_commands import run_forked

PROGRAMS = {
    "writes to a pipe that nobody reads": "import os; r, w = os.pipe(); os.close(r); os.write(w, b'x')",
    "is interrupted, and does not catch it": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "ends before a thread": "from threading import Timer; Timer(0.2, print, ['done']).start()",
    "has an error in a thread": "from threading import Thread; Thread(target=lambda: 1 / 0).start()",
    "ends with words": "import sys; sys.exit('why')",
    "does something at its end": "import atexit; atexit.register(print, 'end'); 1 / 0",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_forked_command_ends_as_one_that_is_started(program: str) -> None:
    command = [sys.executable, "-c", program]
    started = subprocess.run(command, capture_output=True, text=True, check=False)
    forked = run_forked(command, 60)
    assert (forked.returncode, forked.stdout) == (started.returncode, started.stdout)
    assert forked.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]
