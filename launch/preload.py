"""Import the modules of a rank in the fork server, from which `forked.py` forks the ranks.

A module that fails to import here fails again, with its reason, in the rank that needs it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal

from ..kernels import driver

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to every process by some clusters; this one must outlive its ranks
ENVIRONMENT = dict(os.environ)
"""Environment that ranks inherit, without the variables that torchrun sets for each."""


def _import() -> None:
    """Import the trainer, but nothing that queries the GPUs: a process forked after that can't use them.

    So not the compiler, which queries them on import in torch 2.11, and no package of kernels.
    """
    import torch.distributed.run  # noqa: F401  # pyright: ignore[reportUnusedImport]

    from ..trainer import run  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from . import rank  # noqa: F401  # pyright: ignore[reportUnusedImport]


def _import_what_configs_name() -> None:
    """Import the data and the optimizer of most runs: else every rank would read these modules."""
    from ..data import nodes  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from ..optim.optimizers import adamw  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from ..trainer import machine_gpus  # noqa: F401  # pyright: ignore[reportUnusedImport]


for load in (_import, _import_what_configs_name):
    with contextlib.suppress(Exception):
        load()
gc.freeze()  # ranks neither collect these objects nor copy their pages
MAY_FORK = not driver.began()
"""True if a forked child can use a GPU: the driver has not been initialized here."""
