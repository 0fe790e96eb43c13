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
    held: list[Exception] = []  # under a name it and this frame would hold each other, and the caller's tensors
    result: T | None = None
    try:
        result = action()
    except Exception as error:
        held.append(error)
    if mesh.any(bool(held)):
        config_error = mesh.any(any(isinstance(error, ConfigError) for error in held))
        raise held.pop() if held else PeerFailed(config_error)
    return result  # type: ignore[return-value]


def from_main(mesh: Mesh, action: Callable[[], T]) -> T:
    """Run a local action on rank 0 only. Return its result, or raise its exception, on all ranks.

    For reads of a shared file system, and for decisions that all ranks must take alike. A result that can't be pickled raises
    TypeError on all ranks; where an exception can't, the other ranks raise PeerFailed.
    """
    if mesh.layout.world_size == 1:
        return action()
    outcome: tuple[T] | Exception | None = None
    message = b""
    if mesh.is_main:
        outcome, message = _outcome_and_message(action)
    message = mesh.from_main(message)
    if not mesh.is_main:
        outcome = pickle.loads(message)
    try:
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        return outcome[0]
    finally:
        del outcome  # an exception and this frame would hold each other


def _outcome_and_message(action: Callable[[], T]) -> tuple[tuple[T] | Exception, bytes]:
    """Return the result of an action or its exception, and the same pickled for the other ranks. Raise nothing of its own.

    It is pickled before the collective: a rank that failed within it would leave its peers there.
    """
    try:
        result = (action(),)
        try:
            return result, _pickled(result)
        except Exception as error:  # classes of a user's own raise whatever they like
            raise TypeError(f"rank 0 can't send a {type(result[0]).__name__} to the other ranks: {error}") from error
    except Exception as error:
        try:
            return error, _pickled(error)
        except Exception:
            return error, pickle.dumps(PeerFailed(isinstance(error, ConfigError)))


def _pickled(value: object) -> bytes:
    """Return a value pickled. Raise what pickling or reading it back raises."""
    data = pickle.dumps(value)
    pickle.loads(data)
    return data


def on_main(mesh: Mesh, action: Callable[[], None]) -> None:
    """Run `action` on rank 0 only. Raises on all ranks if it fails."""
    raise_on_all_ranks(mesh, action if mesh.is_main else lambda: None)
