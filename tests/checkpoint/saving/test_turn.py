"""A save's progress, and its turn at what saves share, without any save."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest

from meshloom.checkpoint.saving.progress import SavePhase, SaveProgress
from meshloom.checkpoint.saving.turn import Turn


@pytest.mark.parametrize(
    ("wait", "phase", "by_disk", "by_memory"),
    [
        (Turn.wait_for_tensors, SavePhase.SNAPSHOTTED, True, True),
        (Turn.wait_for_keepers, SavePhase.KEPT, False, True),
        (Turn.wait_for_writer, SavePhase.WRITTEN, True, False),
        (Turn.wait_to_commit, SavePhase.ENDED, True, False),
    ],
)
def test_a_save_waits_for_a_phase_of_all_that_use_the_same(
    wait: Callable[[Turn], None], phase: SavePhase, by_disk: bool, by_memory: bool
) -> None:
    """The save before last counts as the last one does: a later save may be ahead of it."""
    for disk, memory, waits in ((True, False, by_disk), (False, True, by_memory)):
        for busy in (0, 1):
            saves = [SaveProgress(), SaveProgress()]
            first = Turn(saves[0], None, disk=disk, memory=memory)
            last = Turn(SaveProgress(), Turn(saves[1], first, disk=disk, memory=memory), disk=True, memory=True)
            saves[1 - busy].reach(phase)
            saves[busy].reach(SavePhase(phase - 1))
            waiting = threading.Thread(target=wait, args=(last,), daemon=True)
            waiting.start()
            waiting.join(0.02 if waits else 10)
            assert waiting.is_alive() == waits
            saves[busy].reach(phase)
            waiting.join(10)
            assert not waiting.is_alive()


def test_the_writer_is_free_once_no_earlier_save_to_the_disk_needs_it() -> None:
    on_disk, in_memory = SaveProgress(), SaveProgress()
    before = Turn(in_memory, Turn(on_disk, None, disk=True, memory=False), disk=False, memory=True)
    last = Turn(SaveProgress(), before, disk=True, memory=True)
    on_disk.reach(SavePhase.KEPT)
    assert not last.writer_is_free
    on_disk.reach(SavePhase.WRITTEN)
    assert last.writer_is_free, "the one in memory needs no writer"


def test_a_phase_is_never_taken_back_and_a_wait_may_end_without_it() -> None:
    progress = SaveProgress()
    progress.reach(SavePhase.ENDED)
    progress.reach(SavePhase.SNAPSHOTTED)
    assert progress.phase == SavePhase.ENDED and not progress.wait(SavePhase.LEFT, 0.01)


def test_a_save_forgets_earlier_ones_that_have_ended_but_no_open_one() -> None:
    open_save, ended = SaveProgress(), SaveProgress()
    first = Turn(open_save, None, disk=True, memory=False)
    second = Turn(ended, first, disk=True, memory=False)
    last = Turn(SaveProgress(), second, disk=True, memory=False)
    ended.reach(SavePhase.ENDED)
    held = weakref.ref(second)
    last.forget_ended()
    del second
    gc.collect()
    assert held() is None
    assert not last.writer_is_free, "the first still writes"
    open_save.reach(SavePhase.ENDED)
    assert last.writer_is_free
