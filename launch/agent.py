"""`torchrun` that ends with the exit code of the process that failed first, instead of 1.

python -m meshloom.launch.agent <torchrun's own arguments>
python -m meshloom.launch.agent --when-told <file descriptor>

The second form is started while the run is still being checked (`torchrun.PreparedAgent`): it has PyTorch imported by the
time that the arguments come, through the pipe, with the environment for the workers. If that closes without, it ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main(argv: list[str]) -> int:
    """Run torchrun's agent with these arguments. Returns 0, or the code of the first worker that failed (128 + signal)."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited: a worker without its handler yet doesn't die of it
    try:
        torchrun(argv)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:  # asked to end the workers at once, which it has
        return 128 + error.sigval
    return 0


def told(descriptor: int) -> list[str] | None:
    """torchrun's arguments, as soon as the launcher has written them to its pipe; None if it has thought better of it."""
    with os.fdopen(descriptor, "rb") as pipe:
        message = pipe.read()
    if not message:
        return None
    order = json.loads(message)
    os.environ.clear()
    os.environ.update(order["environment"])
    return order["arguments"]


if __name__ == "__main__":
    arguments = told(int(sys.argv[2])) if sys.argv[1:2] == ["--when-told"] else sys.argv[1:]
    sys.exit(0 if arguments is None else main(arguments))
