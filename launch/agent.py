"""`torchrun` with forked ranks, which have all modules imported. Its exit code is that of the rank that failed first.

python -m meshloom.launch.agent <torchrun's own arguments>
python -m meshloom.launch.agent --when-told <file descriptor>

The second form is started while the run is still being checked (`torchrun.PreparedAgent`). It imports PyTorch and starts the
ranks' imports, then reads its arguments and the workers' environment from the pipe. If the pipe closes without them, it ends.
Ranks are forked (`forked.py`) if the arguments are for `-m meshloom.launch.rank`; torchrun starts other programs as usual.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from ..parallel.open_files import raise_file_limit
from . import forked
from .torchrun import RANK

LAST_WORDS = 5.0
"""Seconds for ranks to end by themselves after one has failed, and again after they are told to.

torchrun's default is half a minute, which ranks that hang in a collective with the failed one use up.
"""


MOST_RANKS = 16384
"""Ranks that the limit of open files is raised for, as far as the system allows: how many there will be is not known here."""


def main(argv: list[str]) -> int:
    """Run torchrun's agent with these arguments. Return 0, or the code of the first worker that failed (128 + signal)."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    ignore_requests()
    try:
        _run(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} was the first to fail, with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:  # torchrun was told to end the workers, and has
        return 128 + error.sigval
    return 0


def ignore_requests() -> None:
    """Ignore SIGUSR1, which asks workers to save and end. Workers inherit this until they install their handler."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _run(argv: list[str]) -> None:
    """Run torchrun's `main`, with forked ranks."""
    from torch.distributed import run
    from torch.multiprocessing import ProcessContext

    options = run.parse_args(argv)
    raise_file_limit(MOST_RANKS, tell=False)  # the store that all ranks talk through may live in this process
    trains = options.module and options.training_script == RANK
    if trains:
        forked.prepare()
    if not trains or not forked.can_fork():
        run.run(options)
        return
    launch: Any = run.elastic_launch
    ranks: Any = ProcessContext
    join = ranks.join

    def joining(self: ProcessContext, timeout: float | None = None, grace_period: float | None = LAST_WORDS) -> bool:
        return join(self, timeout, grace_period)

    def forking(config: Any, entrypoint: object) -> Callable[..., object]:
        config.start_method = forked.METHOD
        return lambda *_: launch(config, forked.train)(dict(os.environ), options.training_script_args)

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_without_trace)
    run.elastic_launch = forking  # the last step of torchrun's `run`; the steps before stay as they are
    ranks.join = joining
    try:
        run.run(options)
    finally:
        run.elastic_launch, ranks.join = launch, join


def _without_trace(record: logging.LogRecord) -> bool:
    """Drop the agent's own traceback from its log of a rank's failure, which hides the rank's."""
    record.exc_info = None
    return True


def read_arguments(descriptor: int) -> list[str] | None:
    """Return torchrun's arguments once the launcher has written them to its pipe; None if it closed the pipe instead."""
    with os.fdopen(descriptor, "rb") as pipe:
        message = pipe.read()
    if not message:
        return None
    order = json.loads(message)
    os.environ.clear()
    os.environ.update(order["environment"])
    return order["arguments"]


def wait_for_arguments(descriptor: int) -> int:
    """Import, start the ranks' imports, then run torchrun with the arguments from the pipe."""
    ignore_requests()
    forked.prepare()
    import torch.distributed.run  # noqa: F401  # pyright: ignore[reportUnusedImport]

    forked.can_fork()  # waits for the imports, and caches the answer
    arguments = read_arguments(descriptor)
    return 0 if arguments is None else main(arguments)


if __name__ == "__main__":
    sys.exit(wait_for_arguments(int(sys.argv[2])) if sys.argv[1:2] == ["--when-told"] else main(sys.argv[1:]))
