"""The wait for the process that writes."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any, cast

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.writing import writer


def test_progress_is_told_while_the_writer_gets_on() -> None:
    """The wait lasts longer than its patience, which counts from the last progress."""
    here, there = socket.socketpair()
    watermark, told = SimpleNamespace(life=0), list[int]()
    request = cast(Any, SimpleNamespace(target="file", memory=SimpleNamespace(watermark=watermark)))

    def on_progress() -> None:
        told.append(watermark.life)
        if len(told) == 3:
            there.sendall(b"{}\n")
        watermark.life += 1

    with here, there:
        assert writer._answer(here, request, 0.1, on_progress) == b"{}\n"
    assert told[:3] == [0, 1, 2]


def test_a_checkpointer_hands_on_who_hears_of_progress(tmp_path: Any) -> None:
    checkpointer = Checkpointer(tmp_path, Control.alone(), CheckpointConfig(mode="sync"))
    told: list[str] = []
    checkpointer.tell_progress(lambda: told.append("progress"))
    checkpointer._context.writer.on_progress()
    checkpointer.close()
    assert told == ["progress"]
