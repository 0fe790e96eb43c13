"""A save's turn at what saves share, without any save."""

from __future__ import annotations

import threading

from meshloom.checkpoint.saving.stages import Stage, Turn


def test_a_save_waits_only_for_those_that_use_the_same() -> None:
    disk = Turn(None, disk=True, memory=False)
    memory = Turn(disk, disk=False, memory=True)
    last = Turn(memory, disk=True, memory=True)
    assert not last.writer_is_free
    disk.reach(Stage.WRITTEN)
    assert last.writer_is_free, "the one in memory needs no writer"
    waiting = threading.Thread(target=last.wait_for_keepers)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    memory.reach(Stage.KEPT)
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_stage_is_never_taken_back_and_a_wait_may_end_without_it() -> None:
    turn = Turn(None, disk=True, memory=False)
    turn.reach(Stage.ENDED)
    turn.reach(Stage.SNAPSHOTTED)
    assert turn.stage == Stage.ENDED and not turn.wait(Stage.LEFT, 0.01)


def test_an_ended_save_lets_go_of_those_before_but_not_of_an_open_one() -> None:
    first = Turn(None, disk=True, memory=False)
    second = Turn(first, disk=True, memory=False)
    second.reach(Stage.ENDED)
    third = Turn(second, disk=True, memory=False)
    assert not third.writer_is_free, "the first still writes"
    first.reach(Stage.ENDED)
    third.reach(Stage.ENDED)
    assert Turn(third, disk=True, memory=False).writer_is_free
