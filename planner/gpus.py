"""What the GPUs of this machine have and can. A child asks: CUDA keeps some of a GPU's memory for whoever has spoken to it."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType

import torch

from ..config.problems import ConfigError, Problem
from ..kernels import swiglu

GIVE_IT = "give what one GPU has, in GiB: --memory 80"


class GpusHere:
    """Asks while its `with` block lasts. Nothing is started before the first question."""

    def __enter__(self) -> GpusHere:
        self._child = ProcessPoolExecutor(1, get_context("spawn"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._child.shutdown()

    def memory(self) -> float:
        """Bytes of the smallest one. Raises ConfigError where there is none, or none that answers."""
        if torch.cuda.device_count() == 0:
            raise ConfigError([Problem("--memory", "there is no GPU here to ask", GIVE_IT)])
        try:
            return self._child.submit(smallest_memory).result()
        except RuntimeError as error:
            fix = f"look at nvidia-smi, or {GIVE_IT}"
            raise ConfigError([Problem("--memory", f"the GPUs here do not answer: {error}", fix)]) from error

    def fused_swiglu_blocker(self) -> str | None:
        """Why they can't compute SwiGLU inside the products around it; None if they can."""
        try:
            return self._child.submit(unsupported_reason).result()
        except RuntimeError as error:  # the trial has ended the child, or has broken its GPU
            return f"{type(error).__name__}: {error}"


def smallest_memory() -> float:
    """In the child: bytes."""
    return float(min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())))


def unsupported_reason() -> str | None:
    """In the child: of the first GPU, for all."""
    return swiglu.unsupported_reason(torch.device("cuda", 0))
