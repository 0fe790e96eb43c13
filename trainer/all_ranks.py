"""Local actions, such as writing a file: if one fails on any rank, all ranks raise, so that none hangs in a collective."""

from __future__ import annotations

import pickle
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

    def __reduce__(self) -> tuple[type[PeerFailed], tuple[bool]]:
        """Pickle what it was made of: rank 0 may pass it on."""
        return type(self), (self.config_error,)


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


def from_main(mesh: Mesh, action: Callable[[], T]) -> T:
    """Run a local action on rank 0 only. Return its result, or raise its exception, on all ranks.

    For reads of a shared file system, and for decisions that all ranks must take alike. A result must be one that can be
    pickled; where an exception can't, the other ranks raise PeerFailed.
    """
    outcome: tuple[T] | Exception | None = None
    if mesh.is_main:
        try:
            outcome = (action(),)
        except Exception as error:
            outcome = error
    told = mesh.from_main(_as_told(outcome))
    if not mesh.is_main:
        outcome = told
    try:
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        return outcome[0]
    finally:
        del outcome, told  # an exception and this frame would hold each other


def _as_told(outcome: tuple[T] | Exception | None) -> tuple[T] | Exception | None:
    """Return what the other ranks are told: the outcome, or PeerFailed for an exception that does not survive the way."""
    if not isinstance(outcome, Exception):
        return outcome
    try:
        pickle.loads(pickle.dumps(outcome))
        return outcome
    except Exception:
        return PeerFailed(isinstance(outcome, ConfigError))


def on_main(mesh: Mesh, action: Callable[[], None]) -> None:
    """Run `action` on rank 0 only. Raises on all ranks if it fails."""
    raise_on_all_ranks(mesh, action if mesh.is_main else lambda: None)
