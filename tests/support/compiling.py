"""`torch.compile` without the code that it would generate: compiling with g++ takes minutes on a busy machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend


@contextlib.contextmanager
def counted_graphs(backend: str = "aot_eager") -> Iterator[CompileCounterWithBackend]:
    """Trace and differentiate as for a GPU, run the graphs by PyTorch's own operations, and count them (`frame_count`).

    backend: of those that come with PyTorch; "aot_eager_decomp_partition" also chooses what to keep as Inductor does.
    """
    torch._dynamo.reset()
    counter, compile_function = CompileCounterWithBackend(backend), torch.compile

    def compile_counted(function: Callable[..., Any]) -> Any:
        return compile_function(function, backend=counter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile_counted)
        yield counter
