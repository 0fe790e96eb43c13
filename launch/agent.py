"""`torchrun` with forked ranks, which have all modules imported. Its exit code is that of the rank that failed first.

python -m meshloom.launch.agent <torchrun's own arguments>
python -m meshloom.launch.agent --when-told <file descriptor>

The second form is started while the run is still being checked (`torchrun.PreparedAgent`). It imports PyTorch and starts the
ranks' imports, then reads its arguments and the workers' environment from the pipe. If the pipe closes without them, it ends.
Ranks are forked (`forked.py`) if the arguments are for `-m meshloom.launch.rank`; torchrun starts other programs as usual.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from ..parallel.open_files import raise_file_limit
from . import forked
from .nodes.part import FLAG
from .parent import when_launcher_dies
from .torchrun import RANK

LAST_WORDS = 5.0
"""Seconds for ranks to end by themselves after one has failed, and again after they are told to.

torchrun's default is half a minute, which ranks that hang in a collective with the failed one use up.
"""
ORPHAN_SECONDS = 30.0
"""Time for ranks to finish their step and save when their launcher has died; then they are killed."""

LOGS = ("distributed.elastic.multiprocessing.api", "distributed.elastic.agent.server.api", "multiprocessing.spawn")
"""PyTorch's logs that tell of each worker that has failed or is ended."""

MOST_RANKS = 16384
"""Ranks that the limit of open files is raised for, as far as the system allows: how many there will be is not known here."""


def main(argv: list[str]) -> int:
    """Run torchrun's agent with these arguments. Return 0, or the code of the first worker that failed (128 + signal).

    Of a run on several machines the only argument says what this one's part is (`nodes/agent.py`), and torchrun has none.
    """
    ignore_requests()
    hush_torch()  # before PyTorch is imported
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if argv and argv[0].startswith(FLAG):
        from .nodes.agent import run_part

        raise_file_limit(MOST_RANKS, tell=False)
        return run_part(argv[0])
    try:
        return _run(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} was the first to fail, with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:  # torchrun was told to end the workers, and has
        return 128 + error.sigval


def ignore_requests() -> None:
    """Ignore SIGUSR1, which asks workers to save and end. Workers inherit this until they install their handler."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def hush_torch() -> None:
    """Set PyTorch's C++ code to log errors only, in processes that import it from now on, unless the user has set a level.

    When a rank is gone, all others would warn that their store's connection is lost, each with a C++ trace of 20 lines, around
    the one message that says why.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _run(argv: list[str]) -> int:
    """Run torchrun's `main`. If it starts ranks, they are watched; return the exit code then, else 0."""
    from torch.distributed import run
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from .watch.supervisor import Supervisor

    options = run.parse_args(argv)
    raise_file_limit(MOST_RANKS, tell=False)  # the store that all ranks talk through may live in this process
    if not (options.module and options.training_script == RANK):
        run.run(options)
        return 0
    forked.prepare()
    supervisor = Supervisor(options.max_restarts, several=options.nnodes != "1")
    unfollow = when_launcher_dies(lambda: stop_ranks(supervisor.ranks))
    undo = supervisor.watch(LocalElasticAgent)
    logs = [logging.getLogger(f"torch.{name}") for name in LOGS]
    for log in logs:
        log.addFilter(_without_failures)
    try:
        _run_ranks(options)
    except ChildFailedError:
        if supervisor.judgement is None:
            raise
        return supervisor.judgement.code  # it has told which rank failed first
    finally:
        for log in logs:
            log.removeFilter(_without_failures)
        undo()
        unfollow()
        supervisor.close()
    return 0


def _run_ranks(options: argparse.Namespace) -> None:
    """Run torchrun with ranks forked, where that works."""
    from torch.distributed import run
    from torch.multiprocessing import ProcessContext

    if not forked.can_fork():
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

    run.elastic_launch = forking  # the last step of torchrun's `run`; the steps before stay as they are
    ranks.join = joining
    try:
        run.run(options)
    finally:
        run.elastic_launch, ranks.join = launch, join


def _without_failures(record: logging.LogRecord) -> bool:
    """Drop the agent's own messages about failed workers: the supervisor tells of the first, in one line."""
    return record.levelno < logging.WARNING or record.levelno >= logging.CRITICAL


def stop_ranks(ranks: Callable[[], list[int]]) -> None:
    """Stop the ranks and torchrun, of a launcher that has died: nobody else would tell them. They save first, if they can.

    ranks: gives their process ids
    """
    deadline = time.monotonic() + ORPHAN_SECONDS
    while time.monotonic() < deadline and ranks():
        for rank in ranks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGUSR1)
        time.sleep(ORPHAN_SECONDS / 5)
    for rank in ranks():
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGTERM)


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
    hush_torch()
    forked.prepare()
    import torch.distributed.run  # noqa: F401  # pyright: ignore[reportUnusedImport]

    forked.can_fork()  # waits for the imports, and caches the answer
    arguments = read_arguments(descriptor)
    return 0 if arguments is None else main(arguments)


def leave(code: int) -> NoReturn:
    """End this process without taking its objects apart one by one, for which PyTorch's need seconds."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(wait_for_arguments(int(sys.argv[2])) if sys.argv[1:2] == ["--when-told"] else main(sys.argv[1:]))
