"""What a rank imports, in a process that has nothing else behind it: `forked.py` forks the ranks from there.

A module that fails to be imported here fails again, and says why, in the rank that needs it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from pathlib import Path

from ..parallel import driver
from .forked import variable

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a cluster may tell every process: this one is needed until its ranks have ended
ENVIRONMENT = dict(os.environ)
"""What ranks are born with, but for what torchrun says of each."""


def _import() -> None:
    """Not the packages of other kernels: some ask the GPU what it is, and nothing can be forked after that."""
    import torch.distributed.run  # pyright: ignore[reportUnusedImport]

    from ..trainer import run  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from . import train  # noqa: F401  # pyright: ignore[reportUnusedImport]

    if Path("/dev/nvidia0").exists():  # where runs are compiled, as a rule
        import torch._dynamo  # pyright: ignore[reportUnusedImport]
        import torch._inductor.compile_fx  # noqa: F401  # pyright: ignore[reportUnusedImport]


# The compiler starts processes of its own when it is imported, which nobody here would use.
with variable("TORCH_WARM_POOL", "0"), contextlib.suppress(Exception):
    _import()
gc.freeze()  # no rank looks for garbage among these, nor copies the pages that they lie in
MAY_FORK = not driver.began()
"""Whether a child of this process can use a GPU."""
