"""Messages of a round: up a tree, down to all; an abort reaches everyone; nothing stays in the store."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from torch.distributed import HashStore

from meshloom.checkpoint import control as control_module
from meshloom.checkpoint.control import FAN_OUT, Control, children_of, parent_of
from meshloom.checkpoint.errors import CheckpointError
from support.checkpoint_worlds import together


@pytest.mark.parametrize("world", [1, 2, 8, 9, 63, 64, 65, 600, 4096])
def test_every_rank_has_one_parent_and_few_children(world: int) -> None:
    children = [children_of(rank, world) for rank in range(world)]
    assert sorted(child for own in children for child in own) == list(range(1, world))
    assert all(parent_of(child) == rank for rank, own in enumerate(children) for child in own)
    assert all(own == sorted(own) for own in children), "merged in the ranks' order"
    levels = 1
    while FAN_OUT**levels < world:
        levels += 1
    assert max(map(len, children)) <= (FAN_OUT - 1) * levels


def test_messages_are_merged_in_the_ranks_order() -> None:
    def body(control: Control) -> tuple[bytes, bytes]:
        talk = control.begin("test", 20)
        first = talk.agree("one", f"{control.rank} ".encode(), b"".join, lambda joined: joined)
        return first, talk.agree("two", b"", b"".join, lambda _: b"second")

    expected = " ".join(map(str, range(70))).encode() + b" ", b"second"
    assert together(70, body) == [expected] * 70


class Counting:
    """A store that counts what one rank asks of it."""

    def __init__(self, store: HashStore) -> None:
        self.store, self.messages = store, 0

    def clone(self) -> Counting:
        return self

    def __getattr__(self, name: str) -> Any:
        self.messages += 1
        return getattr(self.store, name)


def test_no_rank_exchanges_more_than_a_few_messages_per_level() -> None:
    store = HashStore()
    counted = [Counting(store) for _ in range(100)]
    controls = [Control(rank, 100, each) for rank, each in enumerate(counted)]  # type: ignore[arg-type]

    def body(control: Control) -> None:
        talk = controls[control.rank].begin("save", 60)
        for topic in ("vote", "report"):
            talk.agree(topic, b"", b"".join, lambda _: b"")
        talk.leave()

    together(100, body)
    assert max(each.messages for each in counted) <= 2 * (1 + 3 + 4 * 7 * 3), "four for each of seven children on three levels"
    assert sorted(each.messages for each in counted)[80] <= 2 * 4, "most have none"


@pytest.mark.parametrize("at", [0, 5, 13])
def test_an_abort_reaches_every_rank_at_once(at: int) -> None:
    def body(control: Control) -> str:
        talk = control.begin("test", 60)
        talk.agree("before", b"", b"".join, lambda _: b"")
        if control.rank == at:
            talk.abort("the disk is full")
            return f"rank {at}: the disk is full"
        try:
            with pytest.raises(CheckpointError) as error:
                talk.agree("after", b"", b"".join, lambda _: b"")
        finally:
            talk.abort(str(error.value))
        return str(error.value)

    assert set(together(14, body)) == {f"rank {at}: the disk is full"}, "nobody waits for a time-out"


@pytest.mark.parametrize(("timeout", "look"), [(0.5, 5.0), (60, 0.1)])
def test_an_abort_is_told_before_a_slow_rank_is_blamed(monkeypatch: pytest.MonkeyPatch, timeout: float, look: float) -> None:
    monkeypatch.setattr(control_module, "ABORT_SECONDS", look)
    told = threading.Event()

    def body(control: Control) -> str:
        talk = control.begin("test", timeout)
        if control.rank == 2:
            talk.abort("disk is full")
            return "rank 2: disk is full"
        if control.rank == 1:
            assert told.wait(20), "rank 0 waits for this rank until its time is over"
        with pytest.raises(CheckpointError) as error:
            talk.agree("here", b"", b"".join, lambda _: b"")
        told.set()
        talk.abort(str(error.value))
        return str(error.value)

    assert set(together(3, body)) == {"rank 2: disk is full"}


def test_a_rank_that_is_silent_is_named() -> None:
    def body(control: Control) -> str:
        talk = control.begin("test", 0.5, "checkpoint.timeout")
        if control.rank == 11:
            return ""
        with pytest.raises(CheckpointError) as error:
            talk.agree("here", b"", b"".join, lambda _: b"")
        talk.abort(str(error.value))
        return str(error.value)

    said = together(17, body)
    assert said[8] == "rank 8: no answer on “here” within 0.5 s (checkpoint.timeout); missing: rank 11"
    assert said[0] == said[8] and said[1] == said[8]


def test_messages_that_all_have_left_are_deleted_and_no_others() -> None:
    store = HashStore()
    controls = [Control(rank, 9, store) for rank in range(9)]

    def rounds(control: Control) -> None:
        for _ in range(3):
            talk = control.begin("test", 20)
            left = int(talk.agree("left", str(control.left).encode(), lambda all_: min(all_, key=int), lambda least: least))
            control.forget(left)
            talk.leave()

    threads = [threading.Thread(target=rounds, args=(control,)) for control in controls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [control.left for control in controls] == [3] * 9
    assert store.num_keys() <= 2, "the coordinator's words of the last rounds"
    controls[0].forget(3)
    assert store.num_keys() == 0
