"""What a rank imports, in a process that has nothing else behind it: `forked.py` forks the ranks from there.

A module that fails to be imported here fails again, and says why, in the rank that needs it.
"""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

from ..parallel import driver
from .forked import variable


def _import() -> None:
    """Also what a run on GPUs, compiled and in bf16 as a rule, would import in its first seconds."""
    import torch.distributed.run  # pyright: ignore[reportUnusedImport]

    from ..trainer import run  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from . import train  # noqa: F401  # pyright: ignore[reportUnusedImport]

    if not Path("/dev/nvidia0").exists():
        return
    import torch._dynamo  # pyright: ignore[reportUnusedImport]
    import torch._inductor.compile_fx  # noqa: F401  # pyright: ignore[reportUnusedImport]

    from ..models import flash4, swiglu

    for kernels in (flash4, swiglu):
        with contextlib.suppress(Exception):  # of other packages, and not installed everywhere
            kernels.package()


# The compiler starts processes of its own when it is imported, which nobody here would use.
with variable("TORCH_WARM_POOL", "0"), contextlib.suppress(Exception):
    _import()
gc.freeze()  # no rank looks for garbage among these, nor copies the pages that they lie in
MAY_FORK = not driver.began()
"""Whether a child of this process can use a GPU."""
