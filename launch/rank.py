"""What a rank runs: the run of a command line, in this process.

torchrun --nproc-per-node 4 -m meshloom.launch.rank recipe=quickstart
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.problems import ConfigError
from .switches import BAD_CONFIG, read_switches, refuse

if TYPE_CHECKING:
    from ..trainer.resolve import ResolvedRun
    from ..trainer.signals import StopRequest

FRAMES = 4  # of the way to an error that are told: a library's own, and who called it
# What a disk, a quota or a file server answers, or something in a file's place: a line says it, and where it came up.
UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what this command line says, as one of the processes that it was started among. Return the exit code."""
    from ..trainer.launching import run_processes
    from ..trainer.machine import machine_problems
    from ..trainer.resolve import resolve

    switches, _ = read_switches(sys.argv[1:] if argv is None else argv)
    try:
        resolved = resolve(
            switches.overrides,
            switches.config_dir,
            processes=lambda config: run_processes(config.launch),
            more=machine_problems,
        )
        resolved.refuse()
    except ConfigError as error:
        return refuse(error)
    return run_here(resolved)


def run_here(resolved: ResolvedRun, stop: StopRequest | None = None) -> int:
    """Run in this process. Return the exit code; what only the data or this very process could show is said here."""
    from ..checkpoint.errors import CheckpointError
    from ..data.shards import ShardError
    from ..trainer.launching import under_torchrun
    from ..trainer.run import run

    _configure_log()
    try:
        return run(resolved, stop)
    except (ConfigError, CheckpointError, ShardError) as error:
        code, message = BAD_CONFIG if isinstance(error, ConfigError) else 1, str(error)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        code, message = 1, f"{error.filename or resolved.config.output_dir}: {error.strerror} ({_where(error)})"
    print(f"rank {os.environ['RANK']}: {message}" if under_torchrun() else message, file=sys.stderr)
    return code


def _where(error: BaseException) -> str:
    """The innermost lines of the program that an error came through: whose file it was, or which of them is at fault."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    return "in " + ", ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))


def _configure_log() -> None:
    """Meshloom's own messages go to stderr as they are: all of rank 0's, warnings of the others."""
    log = logging.getLogger("meshloom")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
