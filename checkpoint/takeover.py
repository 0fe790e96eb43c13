"""A folder of checkpoints gets another run: what the run before has saved there must not be taken for the new one's."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from pathlib import Path

from .files import LocalFiles, RemoteFiles
from .folder import LATEST, OWNER, SetBack, StepListing, list_steps, step_name
from .identity import RunIdentity
from .writing.disk import replace_small, sync_folder

log = logging.getLogger(__name__)

SAVES = "saves.jsonl"
DAMAGED = RunIdentity("damaged")
"""Stands for the run of steps whose manifests are damaged."""


def take_over(path: Path, run: RunIdentity, step: int | None = None) -> None:
    """Make a folder on a file system this run's. Another run's steps move into a folder of their own, with its log of saves.

    That one, `replaced-<id>`, is a folder of checkpoints again. Nothing is moved for the run that has the folder already.

    step: its own one that it goes on from, which is the newest from now on, until the next is saved

    Raises UnreadableError where a step can't be read that may be the newest or, if the run has saved none here, another run's.
    """
    listing = list_steps(LocalFiles(path))
    listing.refuse_unreadable(newest_only=listing.has_steps_of(run))
    others = others_of(listing, run)
    # First, so that from here on a crash leaves nothing that counts as this run's.
    replace_small(path / OWNER, _encode(run, listing.commit, step), "owner")
    for other, names in others.items():
        place = free_name(path, f"replaced-{other.id[:8]}")
        place.mkdir()
        (place / OWNER).write_bytes(_encode(other))
        for name in (*names, LATEST, SAVES):
            with contextlib.suppress(FileNotFoundError):
                (path / name).rename(place / name)
        sync_folder(path, "owner.folder")
        log.warning("%s held another run's checkpoints: they are in %s now", path, place.name)


def take_over_remote(files: RemoteFiles, run: RunIdentity, step: int | None = None) -> None:
    """Make a folder on an object store this run's: see `take_over`.

    Nothing can be renamed there: another run's steps stay, and don't count.
    """
    listing = list_steps(files)
    listing.refuse_unreadable(newest_only=listing.has_steps_of(run))
    others = others_of(listing, run)
    files.write(OWNER, _encode(run, listing.commit, step))
    for names in others.values():
        log.warning("%s holds another run's checkpoints, which stay and no longer count: %s", files.label(), ", ".join(names))


def others_of(listing: StepListing, run: RunIdentity) -> dict[RunIdentity, list[str]]:
    """Steps that other runs have saved, by run. One whose manifest is damaged is this run's if it has saved here before."""
    saved_by = {name: head.run if head else DAMAGED for name, head in listing.heads.items()}
    returns = listing.has_steps_of(run)
    others: dict[RunIdentity, list[str]] = {}
    for name, saver in sorted(saved_by.items()):
        if saver is not None and saver.id != run.id and not (saver == DAMAGED and returns):
            others.setdefault(saver, []).append(name)
    return others


def free_name(folder: Path, stem: str, suffix: str = "") -> Path:
    """A name in a folder that nothing has: the stem, with a number where it is taken, and the suffix."""
    numbered = (folder / f"{stem}{f'-{number}' if number else ''}{suffix}" for number in itertools.count())
    return next(path for path in numbered if not path.exists())


def _encode(run: RunIdentity, commit: int = 0, step: int | None = None) -> bytes:
    back = {} if step is None else SetBack(step_name(step), commit).as_dict()
    return json.dumps({**run.as_dict(), **back}).encode() + b"\n"
