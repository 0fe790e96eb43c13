"""Work that one rank of a host does for all of them, so that a shared file system is not asked once per rank.

torchrun gives every rank a file for errors, those of a host in one folder for each attempt. What the first rank has found lies
in that folder for the others. Ranks that srun or mpirun has started share no such folder: each does its own work.

All ranks of a host must make the same calls in the same order.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from .problems import ConfigError

T = TypeVar("T")

SOONEST, LATEST = 0.005, 0.2
"""Seconds between two looks for what the first rank publishes: they grow while it works. The folder is the host's own."""

_calls: Counter[str] = Counter()


def attempt_folder() -> Path | None:
    """Return the folder that the ranks of this host share until they end or start again; None where there is none."""
    given = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(given).parents[1] if given else None


def is_first_on_host() -> bool:
    """Return whether this rank is the first of its host; one that was started alone is."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def share_on_host(name: str, make: Callable[[], T]) -> T:
    """Return what `make` returns on the host's first rank, or raise its ConfigError.

    A rank makes it itself where the first one's can't be pickled, or where making it raised anything else there.
    """
    place = _next_place(name)
    if place is None:
        return make()
    if not is_first_on_host():
        found = _wait_for(place)
        if isinstance(found, ConfigError):
            raise found
        return cast(T, found[0]) if found else make()
    outcome: tuple[T] | ConfigError | tuple[()] = ()
    try:
        outcome = (make(),)
        return outcome[0]
    except ConfigError as error:
        outcome = error
        raise
    finally:
        _publish(place, outcome)


def after_first_on_host(name: str, make: Callable[[], T]) -> T:
    """Call `make` on every rank, on the others once the host's first rank is done: they find what it has built."""
    place = _next_place(name)
    if place is None:
        return make()
    if not is_first_on_host():
        _wait_for(place)
        return make()
    try:
        return make()
    finally:
        _publish(place, ())


def _next_place(name: str) -> Path | None:
    """Return the file of this call; None for a rank that is alone, or shares no folder."""
    folder = attempt_folder()
    if folder is None or os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        return None
    _calls[name] += 1
    return folder / f"{name}-{_calls[name]}.pickle"


def _publish(place: Path, outcome: object) -> None:
    """Publish something for the other ranks, whole from the moment it has its name; nothing, where it can't be pickled."""
    try:
        data = pickle.dumps(outcome)
    except Exception:  # objects of a user's own class raise whatever they like
        data = pickle.dumps(())
    writing = place.with_suffix(".writing")
    try:
        writing.write_bytes(data)
    except OSError:  # a full disk has room for an empty file
        writing.touch()
    writing.rename(place)


def _wait_for(place: Path) -> tuple[object, ...] | ConfigError:
    """Wait for what the first rank publishes. Where it is killed, torchrun ends this one, too."""
    pause = SOONEST
    while not place.exists():
        time.sleep(pause)
        pause = min(2 * pause, LATEST)
    with contextlib.suppress(Exception):  # a class that can be pickled and not be read back; an empty file
        return pickle.loads(place.read_bytes())
    return ()
