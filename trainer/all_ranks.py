"""What may go wrong on one process alone, such as writing a file, goes wrong on all: none is left waiting for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..config.problems import ConfigError
from ..parallel.mesh import Mesh

T = TypeVar("T")


class FailedElsewhere(RuntimeError):
    """Another process could not go on, and says why itself. refused: for its config."""

    def __init__(self, refused: bool) -> None:
        super().__init__("another process could not go on")
        self.refused = refused


def together(mesh: Mesh, action: Callable[[], T]) -> T:
    """What `action` gives on this process, once it has gone well on all. One small collective.

    action: must not communicate, or processes that wait for one in which it failed would meet it in another collective.

    Raises what went wrong here, or FailedElsewhere.
    """
    fault: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as error:
        fault = error
    if mesh.any(fault is not None):
        refused = mesh.any(isinstance(fault, ConfigError))
        raise fault if fault is not None else FailedElsewhere(refused)
    return result  # type: ignore[return-value]


def on_main(mesh: Mesh, action: Callable[[], None]) -> None:
    """`action` on rank 0 alone, `together` with the others, who do nothing: what fails there ends all."""
    together(mesh, action if mesh.is_main else lambda: None)
