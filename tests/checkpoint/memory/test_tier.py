"""The in-memory tier: trainers die, whole nodes die, and the run goes on from the keepers' memory, bit for bit."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import FileStore

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import CheckpointError, DamageError
from meshloom.checkpoint.identity import RunIdentity
from meshloom.checkpoint.memory import keeper, tier
from meshloom.checkpoint.memory.keeper import dismiss, registered
from meshloom.checkpoint.memory.tier import DOMAIN_VARIABLE
from meshloom.checkpoint.memory.wire import Address, Connection
from meshloom.checkpoint.restore import holds_checkpoint, read_state, restore
from support.checkpoint_runs import restored_step
from support.checkpoint_worlds import Gate, fragments, holds, make_arrays, together, told_of

A = RunIdentity("a" * 32)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder of checkpoints; its keepers are ended afterwards."""
    yield tmp_path / "checkpoints"
    for entry, address in registered(tmp_path / "checkpoints").items():
        dismiss(entry, address)


def crashed_run(folder: Path, world: int, *, steps: int = 3, group: int = 2, nodes: int = 2, disk_step: int = 0) -> None:
    """Ranks of run A that keep every step in memory (and one on the disk), and then are all killed at once."""
    marks = folder.parent
    children: list[int] = []
    try:
        _fork_ranks(folder, world, children, steps, group, nodes, disk_step)
        deadline = time.monotonic() + 120
        while not all((marks / f"done{rank}").exists() for rank in range(world)):
            assert time.monotonic() < deadline, "the run did not get that far"
            assert not any(os.waitpid(child, os.WNOHANG)[0] for child in children), "a rank has died"
            time.sleep(0.01)
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # one that had died
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _fork_ranks(folder: Path, world: int, children: list[int], steps: int, group: int, nodes: int, disk_step: int) -> None:
    marks = folder.parent
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                os.environ[DOMAIN_VARIABLE] = f"node {rank * nodes // world}"
                control = Control(rank, world, FileStore(str(marks / "store"), world))
                config = CheckpointConfig(memory_every=1, memory_group=group, timeout=60, keep=0)
                checkpointer = Checkpointer(folder, control, config)
                checkpointer.begin_run(A)
                for step in range(1, steps + 1):
                    held = fragments(make_arrays(step), world, 5)[rank]
                    checkpointer.save(step, held, {"step": step}, disk=step == disk_step, required=True)
                    checkpointer.before_update()
                done = 0
                while done < steps:
                    done += len([report for report in checkpointer.poll() if report.outcome in ("kept", "committed")])
                    time.sleep(0.005)
                (marks / f"done{rank}").touch()
                time.sleep(300)
            finally:
                os._exit(1)
        children.append(child)


def lose_keepers(folder: Path, slots: set[int]) -> None:
    """End what a node takes with it: the keepers of its ranks. Their entries in the registry stay behind."""
    for address in registered(folder).values():
        if address.slot in slots:
            link = Connection(address, 5.0)
            link.ask({"do": "exit"})
            link.close()
            deadline = time.monotonic() + 60
            with contextlib.suppress(CheckpointError):
                while time.monotonic() < deadline:  # until there is nobody at that door
                    Connection(address, 5.0).close()
                    time.sleep(0.01)
                raise AssertionError("a keeper does not end")


def recovered(folder: Path, world: int, expected: int) -> list[str]:
    """Restore on so many ranks; everything must be as it was at that step. Returns where it came from."""
    ranks = fragments(make_arrays(), world, 77, blank=True)
    reports = together(world, lambda control: restore(folder, ranks[control.rank], control, timeout=60))
    assert {report.step for report in reports} == {expected}
    assert reports[0].state == {"step": expected}
    assert holds(ranks, make_arrays(expected))
    return [report.source for report in reports]


@pytest.mark.parametrize("world", [1, 3])
def test_killed_trainers_resume_from_memory_on_any_world_size(folder: Path, world: int) -> None:
    crashed_run(folder, 2)
    assert read_state(folder) == read_state(f"file://{folder}") == {"step": 3}
    assert recovered(folder, world, 3) == ["memory of step 3"] * world
    assert not list(folder.glob("step-*"))


def test_a_lost_node_is_made_again_from_the_mirror(folder: Path) -> None:
    crashed_run(folder, 4)
    lose_keepers(folder, {0, 1})
    assert recovered(folder, 4, 3) == ["memory of step 3"] * 4


def test_a_lost_member_is_made_again_from_xor_parity_of_four(folder: Path) -> None:
    crashed_run(folder, 4, group=4, nodes=4)
    lose_keepers(folder, {2})
    assert recovered(folder, 2, 3) == ["memory of step 3"] * 2


def test_two_losses_in_a_group_fall_back_to_the_disk(folder: Path) -> None:
    crashed_run(folder, 4, group=4, nodes=4, disk_step=2)
    lose_keepers(folder, {0, 3})
    assert recovered(folder, 2, 2)[0].endswith("step-00000002")


@pytest.mark.parametrize("text", [b"not packed", zlib.compress(b"{"), zlib.compress(b"[]"), zlib.compress(b"{}")])
def test_a_version_whose_manifest_is_damaged_is_left_out(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    class Damaged:
        def fetch(self, version: str, what: str, target: memoryview, offset: int) -> None:
            target[:] = text

        def close(self) -> None:
            pass

    monkeypatch.setattr(tier, "Connection", lambda *_: Damaged())
    address = Address("here", 1, "", 0)
    info = {"version": "v", "step": 3, "manifest": len(text), "members": [0], "block": 0, "size": 8}
    assert tier.choose([(address, [info])]) is None, "the disk is next"
    with pytest.raises(DamageError, match="memory of step 3"):
        tier.manifest_of(tier.Recovery("v", 3, {0: (address, 8)}, {}, address, len(text)).encode())


def test_a_damaged_manifest_is_asked_of_another_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [b"not packed", zlib.compress(b'{"world_size": 2}')]

    class Keeper:
        def __init__(self, address: Address, _seconds: float) -> None:
            self._text = texts[address.slot]

        def fetch(self, version: str, what: str, target: memoryview, offset: int) -> None:
            target[:] = self._text

        def close(self) -> None:
            pass

    monkeypatch.setattr(tier, "Connection", Keeper)
    common = {"version": "v", "step": 3, "members": [0, 1], "block": 0, "size": 8}
    statuses = [(Address("here", 1, "", slot), [{**common, "manifest": len(texts[slot])}]) for slot in (0, 1)]
    found = tier.choose(statuses)
    assert found is not None and found.manifest_at.slot == 1


def test_another_runs_memory_is_left_alone(folder: Path) -> None:
    crashed_run(folder, 2, disk_step=1)
    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync"))
    checkpointer.begin_run(RunIdentity("b" * 32))
    checkpointer.close()  # killed before it has saved anything
    assert not holds_checkpoint(folder)
    assert restored_step(folder / "replaced-aaaaaaaa") == 1


def test_memory_is_newer_than_later_steps_of_an_abandoned_branch(folder: Path) -> None:
    """Steps 20 and 30 were saved, then the run was set back and kept steps 1 to 3 in memory."""
    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync", keep=0))
    checkpointer.begin_run(A)
    for step in (20, 30):
        checkpointer.save(step, fragments(make_arrays(step), 1, 0)[0], {"step": step})
    checkpointer.finish()
    crashed_run(folder, 2)
    assert recovered(folder, 1, 3) == ["memory of step 3"]


def test_a_newer_step_on_the_disk_is_preferred(folder: Path) -> None:
    crashed_run(folder, 2)
    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync"))
    checkpointer.begin_run(A)
    checkpointer.save(9, fragments(make_arrays(9), 1, 0)[0], {"step": 9})
    checkpointer.finish()
    assert recovered(folder, 1, 9)[0].endswith("step-00000009")


def test_next_run_takes_over_and_a_clean_end_leaves_no_keeper(folder: Path) -> None:
    crashed_run(folder, 2)
    old = set(registered(folder))
    assert len(old) == 2

    def body(control: Control) -> None:
        config = CheckpointConfig(mode="sync", memory_every=1, timeout=60)
        checkpointer = Checkpointer(folder, control, config)
        held = fragments(make_arrays(4), 2, 5)[control.rank]
        checkpointer.save(4, held, {"step": 4}, disk=False)
        assert [report.outcome for report in checkpointer.poll()] == ["kept"]
        checkpointer.save(5, fragments(make_arrays(5), 2, 5)[control.rank], {"step": 5})
        assert [report.outcome for report in checkpointer.finish()] == ["committed"]

    together(2, body)
    assert not registered(folder)
    assert recovered(folder, 1, 5)[0].endswith("step-00000005")


def test_run_without_the_tier_ends_keepers_of_another_past(folder: Path) -> None:
    crashed_run(folder, 2)
    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync"))
    for step in (1, 2):
        checkpointer.save(step, fragments(make_arrays(step), 1, 0)[0], {"step": step})
    checkpointer.finish()
    assert recovered(folder, 1, 2)[0].endswith("step-00000002")
    assert not registered(folder)


def test_keepers_of_a_recovery_end_with_those_recovered_from(folder: Path) -> None:
    crashed_run(folder, 2)
    lose_keepers(folder, {0})
    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync", memory_every=1, timeout=60))
    assert recovered(folder, 1, 3) == ["memory of step 3"]
    checkpointer.save(4, fragments(make_arrays(4), 1, 0)[0], {"step": 4}, disk=False)
    assert [address.slot for address in registered(folder).values()] == [0]
    checkpointer.save(5, fragments(make_arrays(5), 1, 0)[0], {"step": 5})
    checkpointer.finish()
    assert not registered(folder)


def test_closing_leaves_a_snapshot_that_is_newer_than_the_disk(folder: Path) -> None:
    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync", memory_every=1, timeout=60))
    for step in (1, 2):
        checkpointer.save(step, fragments(make_arrays(step), 1, 0)[0], {"step": step}, disk=step == 1)
    checkpointer.poll()
    checkpointer.close()
    assert recovered(folder, 1, 2) == ["memory of step 2"]


def test_a_dead_keeper_costs_a_version_and_is_replaced(folder: Path) -> None:
    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync", memory_every=1, timeout=60))
    held = fragments(make_arrays(1), 1, 0)[0]
    checkpointer.save(1, held, {"step": 1}, disk=False)
    assert checkpointer._context.memory is not None
    assert checkpointer._context.memory._keeper is not None
    checkpointer._context.memory._keeper._process.kill()
    checkpointer._context.memory._keeper._process.wait()
    checkpointer.save(2, held, {"step": 2}, disk=False)
    assert [report.outcome for report in checkpointer.poll()] == ["kept", "kept"]
    checkpointer.save(3, held, {"step": 3})
    checkpointer.finish()
    assert not registered(folder)


def test_a_keeper_that_can_not_start_costs_its_version_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, left = keeper.Keeper.__init__, 2

    def refuse(self: keeper.Keeper, folder: Path, slot: int, timeout: float) -> None:
        nonlocal left
        if slot == 1 and left:
            left -= 1
            raise OSError("no process to be had")
        make(self, folder, slot, timeout)

    monkeypatch.setattr(keeper.Keeper, "__init__", refuse)

    def body(control: Control) -> list[tuple[str, str]]:
        checkpointer = Checkpointer(folder, control, CheckpointConfig(mode="sync", memory_every=1, timeout=60))
        for step, disk in ((1, False), (2, True), (3, False), (4, True)):
            checkpointer.save(step, fragments(make_arrays(step), 2, 5)[control.rank], {"step": step}, disk=disk)
        return [(report.outcome, report.reason) for report in checkpointer.poll() + checkpointer.finish()]

    why = "not kept in memory: no process to be had"
    assert together(2, body) == [[("unkept", why), ("committed", why), ("kept", ""), ("committed", "")]] * 2


@pytest.mark.parametrize("disk", [False, True])
def test_a_stuck_keeper_is_given_up_and_replaced(folder: Path, disk: bool) -> None:
    config = CheckpointConfig(mode="sync", memory_every=1, timeout=60)
    checkpointer = Checkpointer(folder, Control.alone(), config)
    checkpointer.save(1, fragments(make_arrays(1), 1, 0)[0], {"step": 1}, disk=False)
    assert checkpointer._context.memory is not None and checkpointer._context.memory._keeper is not None
    checkpointer._context.memory._keeper._link.settimeout(0.4)  # for this one alone: who is to take its place may need longer
    os.kill(checkpointer._context.memory._keeper._process.pid, signal.SIGSTOP)
    for step in (2, 3):
        checkpointer.save(step, fragments(make_arrays(step), 1, 0)[0], {"step": step}, disk=disk)
    outcomes = [report.outcome for report in checkpointer.poll()]
    assert outcomes == ["kept", *(["committed", "committed"] if disk else ["unkept", "kept"])]
    checkpointer.finish()


def test_keeper_dying_after_replication_keeps_the_step_on_disk(folder: Path) -> None:
    from meshloom.checkpoint import faults

    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync", memory_every=1, timeout=60))

    def kill(boundary: str, amount: int) -> int:
        if boundary == "keep.complete.before":
            (memory := checkpointer._context.memory)._keeper._process.kill()  # type: ignore[union-attr]
            memory._keeper._process.wait()  # type: ignore[union-attr]
        return amount

    faults.install(kill)
    try:
        checkpointer.save(1, fragments(make_arrays(1), 1, 0)[0], {"step": 1})
    finally:
        faults.install(None)
    (report,) = checkpointer.poll()
    assert report.outcome == "committed" and "not kept in memory" in report.reason
    checkpointer.save(2, fragments(make_arrays(2), 1, 0)[0], {"step": 2}, disk=False)
    assert [report.outcome for report in checkpointer.finish()] == ["kept"]


@pytest.mark.parametrize("boundary", [6, 7, 8])
def test_keeper_killed_during_a_copy_loses_only_that_version(folder: Path, boundary: int) -> None:
    """The second version's: before the exchange, after its own blocks are sent, after the others' have come."""
    from meshloom.checkpoint import faults

    def body(control: Control) -> list[str]:
        os.environ.pop(faults.VARIABLE, None)
        if control.rank == 0:
            os.environ[faults.VARIABLE] = f"kill:{boundary}"
        checkpointer = Checkpointer(folder, control, CheckpointConfig(mode="sync", memory_every=1, timeout=60))
        outcomes: list[str] = []
        for step in (1, 2):
            held = fragments(make_arrays(step), 2, 5)[control.rank]
            checkpointer.save(step, held, {"step": step}, disk=False)
            outcomes += [report.outcome for report in checkpointer.poll()]
        os._exit(0 if outcomes == ["kept", "unkept"] else 3)

    children: list[int] = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                body(Control(rank, 2, FileStore(str(folder.parent / "store"), 2)))
            finally:
                os._exit(4)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert recovered(folder, 1, 1) == ["memory of step 1"]


def test_trainer_dying_during_an_answer_leaves_the_keeper_alive(folder: Path) -> None:
    child = os.fork()
    if child == 0:
        checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync", memory_every=1, timeout=60))
        checkpointer.save(1, fragments(make_arrays(1), 1, 0)[0], {"step": 1}, disk=False)
        memory = checkpointer._context.memory
        assert memory is not None and memory._keeper is not None and memory._held is not None
        group = [memory._keeper.address.as_dict()]
        memory._keeper._reply = lambda: os._exit(0)  # type: ignore[method-assign,return-value]
        memory._keeper.hold(memory._held, 100, "next", 2, group, 0)
    os.waitpid(child, 0)
    time.sleep(0.5)
    assert recovered(folder, 1, 1) == ["memory of step 1"]


def test_where_the_disk_is_busy_the_snapshot_stays_in_memory(folder: Path) -> None:
    from meshloom.checkpoint import faults

    slow = Gate("commit.rename.before")
    faults.install(slow)
    try:
        checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(memory_every=1, timeout=60, keep=0))
        reports = []
        for step in (1, 2, 3, 4):
            checkpointer.save(step, fragments(make_arrays(step), 1, 0)[0], {"step": step})
            checkpointer.before_update()
            if step == 1:
                assert slow.reached.wait(60)  # or the second would not find the writer free
            if step == 3:
                reports += told_of(checkpointer, 3)
        slow.open.set()
        reports += checkpointer.finish()
    finally:
        faults.install(None)
    outcomes = {report.step: report.outcome for report in reports}
    # The third finds the second waiting for the first; for the fourth there is no memory beside those and what is kept.
    assert outcomes == {1: "committed", 2: "committed", 3: "kept", 4: "skipped"}
    assert "slower than the schedule" in next(report.reason for report in reports if report.step == 3)
    assert max(report.host_memory_bytes for report in reports) <= 3 * 2 * 2**20


def test_plan_changed_while_disk_is_busy_is_remade_for_memory(folder: Path) -> None:
    from meshloom.checkpoint import faults

    slow, both = Gate("keep.complete.after"), threading.Barrier(2, action=lambda: slow.open.set())

    def body(control: Control) -> list[str]:
        checkpointer = Checkpointer(folder, control, CheckpointConfig(memory_every=1, timeout=60, keep=0))
        for step in (1, 2):  # the second time each rank holds other boxes
            checkpointer.save(step, fragments(make_arrays(step), 2, step)[control.rank], {"step": step})
            checkpointer.before_update()
        both.wait(60)  # the second has its plan; the first goes to the disk only now
        outcomes = [report.outcome for report in checkpointer.wait()]
        checkpointer.close()  # what is newer than the disk stays in memory
        return outcomes

    faults.install(slow)
    try:
        outcomes = together(2, body)
    finally:
        faults.install(None)
    assert outcomes == [["committed", "kept"]] * 2
    assert recovered(folder, 1, 2) == ["memory of step 2"]


def test_slow_keepers_skip_a_snapshot_and_never_block_training(folder: Path) -> None:
    from meshloom.checkpoint import faults

    slow = Gate("keep.posted.before")
    faults.install(slow)
    try:
        checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(memory_every=1, timeout=60, keep=0))
        checkpointer.prepare(fragments(make_arrays(1), 1, 0)[0])
        for step in range(1, 6):
            checkpointer.save(step, fragments(make_arrays(step), 1, 0)[0], {"step": step}, disk=False)
            checkpointer.before_update()
        slow.open.set()
        reports = {report.step: report for report in checkpointer.wait()}
    finally:
        faults.install(None)
    checkpointer.close()
    assert [reports[step].outcome for step in range(1, 6)] == ["kept"] * 3 + ["skipped"] * 2
    assert "no memory free" in reports[5].reason
