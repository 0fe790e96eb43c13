"""Gathering a message of every rank up the tree, where what has not changed since the last time is not sent again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ..control import Round
from ..digest import text_digest
from ..errors import CheckpointError

Note = dict[str, Any]
Merge = Callable[[Sequence[bytes]], bytes]


class ChangeGathering:
    """The messages of the ranks that a rank sends for, joined; kept from time to time.

    Each time a rank sends the digest of what it has gathered, and that itself only where its parent does not have it. So in
    the steady state some hundred bytes go from rank to rank.
    """

    def __init__(self, merge: Merge) -> None:
        """merge: joins the messages of runs of ranks, in the ranks' order. Raises CheckpointError where they contradict."""
        self._merge = merge
        self._received: dict[int, tuple[str, bytes]] = {}  # by child
        self._told = ""  # the digest that the parent has the message of
        self._parts: list[str] = []
        self.digest = ""
        self.joined = b""

    def gather(self, talk: Round, topic: str, mine: bytes, note: Note, fold: Callable[[list[Note]], Note]) -> Note:
        """Gather. The coordinator's `joined` is then of all ranks. Returns the notes of the ranks so far, folded.

        note: what this rank says besides, each time
        """
        notes, digests, messages = [note], [text_digest(mine)], [mine]
        for child, message in zip(talk.control.children, talk.collect(topic), strict=True):
            line, _, body = message.partition(b"\n")
            said: dict[str, Any] = json.loads(line)
            if body:
                self._received[child] = said["digest"], body
            elif child not in self._received or self._received[child][0] != said["digest"]:
                raise CheckpointError(f"rank {child} has other news than it has told; it will tell them at the next save")
            notes.append(said["note"])
            digests.append(said["digest"])
            messages.append(self._received[child][1])
        if digests != self._parts:
            self.joined = self._merge(messages)
            self.digest, self._parts = text_digest(" ".join(digests).encode()), digests
        folded = fold(notes)
        line = json.dumps({"digest": self.digest, "note": folded}).encode()
        talk.send(line + b"\n" + (self.joined if self.digest != self._told else b""))
        self._told = self.digest
        return folded

    def forget(self) -> None:
        """After a failure it is not known who has what: tell everything again."""
        self._told = ""
