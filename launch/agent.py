"""`torchrun` that ends with the exit code of the process that failed first, instead of 1.

python -m meshloom.launch.agent <torchrun's own arguments>
"""

from __future__ import annotations

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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
