"""Memory and features of this machine's GPUs, queried in a child process: a CUDA context would keep GPU memory."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType

import torch

from ..config.problems import ConfigError, Problem
from ..kernels import swiglu

GIVE_IT = "give what one GPU has, in GiB: --memory 80"


class GpusHere:
    """Queries the GPUs within a `with` block. Starts its child process with the first query."""

    def __enter__(self) -> GpusHere:
        self._child = ProcessPoolExecutor(1, get_context("spawn"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._child.shutdown()

    def memory(self) -> float:
        """Return the bytes of the smallest GPU. Raises ConfigError if there is none, or none answers."""
        if torch.cuda.device_count() == 0:
            raise ConfigError([Problem("--memory", "there is no GPU here to ask", GIVE_IT)])
        try:
            return self._child.submit(smallest_memory).result()
        except RuntimeError as error:
            fix = f"look at nvidia-smi, or {GIVE_IT}"
            raise ConfigError([Problem("--memory", f"the GPUs here do not answer: {error}", fix)]) from error

    def fused_swiglu_blocker(self) -> str | None:
        """Return why the GPUs can't fuse SwiGLU into the products around it; None if they can."""
        try:
            return self._child.submit(unsupported_reason).result()
        except RuntimeError as error:  # the trial has killed the child, or broken its CUDA context
            return f"{type(error).__name__}: {error}"


def smallest_memory() -> float:
    """Return the bytes of the smallest GPU. Runs in the child."""
    return float(min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())))


def unsupported_reason() -> str | None:
    """Return why the first GPU, standing for all, does not support fused SwiGLU. Runs in the child."""
    return swiglu.unsupported_reason(torch.device("cuda", 0))
