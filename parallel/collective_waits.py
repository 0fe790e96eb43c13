"""Measure how long a rank waits for collectives inside its layers: those of tensor, context and expert parallelism.

They are PyTorch's functional collectives, and one operator waits for them, in compiled blocks, too. Its kernel is wrapped by
the means that PyTorch has for that. With gloo the host blocks in it; on a GPU the stream that computes waits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed import _functional_collectives as funcol

Waiting = Callable[[], AbstractContextManager[None]]
"""Makes a context around waiting, which measures it."""

_measuring: list[Waiting] = []  # the newest one does


def measure_collectives(device: torch.device, waiting: Waiting) -> Callable[[], object]:
    """Measure how long functional collectives are waited for, from now on. Returns what ends that."""
    _wrap(device.type.upper())
    _measuring.append(waiting)
    return functools.partial(_measuring.remove, waiting)


@functools.cache
def _wrap(key: str) -> torch.library.Library:
    """Wrap the operator's kernel for a dispatch key, for the life of the process."""
    operator: Any = torch.ops._c10d_functional.wait_tensor.default
    assert callable(funcol.wait_tensor), "the operator is defined by functional collectives"
    # All backends have the same kernel: that of one which nobody uses is the original. Called in this way it lets other threads
    # have Python's lock while it blocks, which a kernel of `torch.library.get_kernel` does not.
    original = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)

    def wait(tensor: torch.Tensor) -> torch.Tensor:
        with _measuring[-1]() if _measuring else nullcontext():
            return operator.redispatch(original, tensor)

    library = torch.library.Library("_c10d_functional", "IMPL")
    library.impl("wait_tensor", wait, key)
    return library
