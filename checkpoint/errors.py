"""The errors that checkpoints raise for users. Imports nothing of ours, so that the writer process stays small.

An error that is kept and raised later is taken out of a list, `raise held.pop()`. Under a name in the frame that raises it, it
and that frame would hold each other, and with them all that their callers have read, until garbage is collected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import SaveReport


class CheckpointError(RuntimeError):
    """A save, a restore or a tool could not do what was asked; the message says what, where, and what to do."""


class SavesFailed(CheckpointError):
    """Saves have failed, and the run ends for it. reports: of saves that have ended and were not told before."""

    def __init__(self, message: str, reports: Sequence[SaveReport] = ()) -> None:
        super().__init__(message)
        self.reports = list(reports)


class HeldError(CheckpointError):
    """A folder can't be written into, because another run does."""


class UnreadableError(CheckpointError):
    """Stored bytes can't be read now, which says nothing about what they are: a disk, a network or a permission fails."""

    def __init__(self, file: str, what: str) -> None:
        self.file = file
        self.what = what
        super().__init__(f"{file}: {what}")

    def __reduce__(self) -> tuple[type[UnreadableError], tuple[str, str]]:
        """Pickle what it was made of, as DamageError."""
        return type(self), (self.file, self.what)


UNREADABLE_FIX = "start again once it can be read, or move that step out of the folder"
"""Advice where a step of a folder of checkpoints can't be read, and may be the newest."""


class DamageError(CheckpointError):
    """Stored bytes are not what was written: names the file and, where one is at fault, the block."""

    def __init__(self, file: str, what: str, block: int | None = None) -> None:
        self.file = file
        self.what = what
        self.block = block
        where = file if block is None else f"{file}, block {block}"
        super().__init__(f"{where}: {what}")

    def __reduce__(self) -> tuple[type[DamageError], tuple[str, str, int | None]]:
        """Pickle what it was made of: a rank may pass it on to others."""
        return type(self), (self.file, self.what, self.block)
