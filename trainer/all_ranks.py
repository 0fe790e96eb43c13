"""Local actions, such as writing a file: if one fails on any rank, all ranks raise, so that none hangs in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..config.problems import ConfigError
from ..parallel.mesh import Mesh

T = TypeVar("T")


class PeerFailed(RuntimeError):
    """Another rank failed, and reports the reason itself. config_error: whether it found the config at fault."""

    def __init__(self, config_error: bool) -> None:
        super().__init__("another rank failed")
        self.config_error = config_error


def raise_on_all_ranks(mesh: Mesh, action: Callable[[], T]) -> T:
    """Run a local action on every rank; if it fails on any, raise on all, so that no rank hangs in a collective.

    Costs one small collective. Return the action's result on this rank.

    action: must not communicate: a rank on which it failed would already be in another collective than its peers

    Raises the action's own exception where it failed, and PeerFailed on the other ranks.
    """
    fault: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as error:
        fault = error
    if mesh.any(fault is not None):
        config_error = mesh.any(isinstance(fault, ConfigError))
        raise fault if fault is not None else PeerFailed(config_error)
    return result  # type: ignore[return-value]


def on_main(mesh: Mesh, action: Callable[[], None]) -> None:
    """Run `action` on rank 0 only. Raises on all ranks if it fails."""
    raise_on_all_ranks(mesh, action if mesh.is_main else lambda: None)
