"""Run a command line's run in this process, as one rank.

torchrun --nproc-per-node 4 -m meshloom.launch.rank recipe=quickstart
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.per_host import share_on_host
from ..config.problems import ConfigError
from .exit_codes import BAD_CONFIG
from .forked import DIES_WITH_PARENT, end_with_parent
from .once import OncePerNode, hook_failure, is_first
from .switches import read_switches, refuse

if TYPE_CHECKING:
    from ..trainer.resolve import ResolvedRun
    from ..trainer.signals import StopRequest

FRAMES = 4  # innermost frames of an error that are reported
# Errors of a disk, a quota or a file server, or a file in a folder's place: reported in one line, without a traceback.
UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what this command line says, as one of the run's processes. Return the exit code."""
    from ..trainer.launching import run_processes
    from ..trainer.machine import machine_problems
    from ..trainer.machine_gpus import machine_here
    from ..trainer.resolve import ResolveOptions, resolve

    try:
        switches, _ = read_switches(sys.argv[1:] if argv is None else argv)
        options = ResolveOptions(lambda config: run_processes(config.launch), more=machine_problems, machine=machine_here)
        resolved = share_on_host("resolved", lambda: resolve(switches.overrides, options, switches.config_dir))
        resolved.refuse()
    except ConfigError as error:
        return refuse(error)
    try:
        return run_here(resolved)
    except Exception as error:  # its launcher tells it once for the run, in order
        from ..trainer.watch.rank import write_failure

        if write_failure(error):
            return 1
        raise


def die_with_parent() -> None:
    """Have this process end with its parent, where that is asked for by an environment variable."""
    if os.environ.get(DIES_WITH_PARENT):
        end_with_parent()


def run_here(resolved: ResolvedRun, stop: StopRequest | None = None) -> int:
    """Run in this process. Return the exit code; print errors that only the data or this process could show."""
    from ..trainer.run import run

    return tell_errors(lambda: run(resolved, stop), resolved.config.output_dir)


def tell_errors(action: Callable[[], int], folder: str) -> int:
    """Do what one process of a run does, and return its exit code. Errors that a user can mend are printed, once per node.

    folder: named where an error of the disk names no file
    """
    from ..checkpoint.errors import CheckpointError
    from ..data.shards.manifest import ShardError
    from ..trainer.launching import under_torchrun

    configure_log()
    try:
        return action()
    except (ConfigError, CheckpointError, ShardError) as error:
        code, message = BAD_CONFIG if isinstance(error, ConfigError) else 1, str(error)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        code, message = 1, f"{error.filename or folder}: {error.strerror} ({_where(error)})"
    except Exception as error:
        failure = hook_failure(error)
        if failure is None:
            raise
        code, message = 1, failure
    if is_first(message):
        print(f"rank {os.environ['RANK']}: {message}" if under_torchrun() else message, file=sys.stderr)
    return code


def _where(error: BaseException) -> str:
    """Return the innermost frames of an error, which tell what the file was for."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    return "in " + ", ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))


def configure_log() -> None:
    """Send Meshloom's log to stderr without a prefix: rank 0's messages, and warnings of other ranks that are theirs alone."""
    log = logging.getLogger("meshloom")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(OncePerNode())
        log.addHandler(handler)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main())
