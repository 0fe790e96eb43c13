"""What a rank imports, in a process that has nothing else behind it: `forked.py` forks the ranks from there.

A module that fails to be imported here fails again, and says why, in the rank that needs it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal

from ..kernels import driver

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a cluster may tell every process: this one is needed until its ranks have ended
ENVIRONMENT = dict(os.environ)
"""What ranks are born with, but for what torchrun says of each."""


def _import() -> None:
    """Nothing that asks what GPUs there are: a process forked after that can't use them. So not the compiler (in 2.11 it does
    as soon as it is imported), and no package of kernels.
    """
    import torch.distributed.run  # noqa: F401  # pyright: ignore[reportUnusedImport]

    from ..trainer import run  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from . import rank  # noqa: F401  # pyright: ignore[reportUnusedImport]


with contextlib.suppress(Exception):
    _import()
gc.freeze()  # no rank looks for garbage among these, nor copies the pages that they lie in
MAY_FORK = not driver.began()
"""Whether a child of this process can use a GPU, as far as its driver says."""
