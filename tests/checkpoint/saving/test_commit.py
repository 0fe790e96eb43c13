"""A save becomes a checkpoint all at once or not at all; the newest complete one is found; failures are said and counted."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from meshloom.checkpoint import faults
from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import CheckpointError, DamageError, SavesFailed
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import find_latest, read_newest, steps_newest_first
from meshloom.checkpoint.report import SaveReport
from meshloom.checkpoint.restore import read_manifest, restore
from meshloom.checkpoint.saving.save import Save
from meshloom.config.problems import ConfigError
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from support.checkpoint_runs import open_run, restored_step, save_steps
from support.checkpoint_worlds import Gate, fragments, holds, make_arrays, together, told_of


@pytest.fixture(autouse=True)
def no_faults_left() -> Iterator[None]:
    yield
    faults.install(None)


def test_the_newest_complete_step_is_found_and_the_rest_ignored(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "absent") is None
    save_steps(tmp_path, 1, 2, 3)
    assert find_latest(tmp_path) == tmp_path / "step-00000003"
    assert find_latest(f"file://{tmp_path}") == tmp_path / "step-00000003"
    (tmp_path / "step-00000009.tmp-abcdef").mkdir()
    (tmp_path / "step-00000008").mkdir()
    (tmp_path / "step-00000007").write_text("a file of that name")
    (tmp_path / "notes.txt").write_text("mine")
    assert find_latest(tmp_path) == tmp_path / "step-00000003"
    assert (tmp_path / "LATEST").read_text() == "step-00000003\n"
    (tmp_path / "LATEST").unlink()
    assert find_latest(tmp_path) == tmp_path / "step-00000003"
    (tmp_path / "step-00000003/rank-00000.safetensors").unlink()
    assert find_latest(tmp_path) == tmp_path / "step-00000002"


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00000.leaves"])
def test_a_truncated_newest_step_is_not_chosen(tmp_path: Path, name: str) -> None:
    save_steps(tmp_path, 1, 2)
    path = tmp_path / "step-00000002" / name
    os.truncate(path, path.stat().st_size - 1)
    assert find_latest(tmp_path) == tmp_path / "step-00000001"
    newest = read_newest(tmp_path)
    assert newest is not None and newest.step == 1
    assert read_manifest(tmp_path).step == 1


def test_a_run_that_was_set_back_goes_on_from_where_it_was_last(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20, 30)
    save_steps(tmp_path, 15)
    assert steps_newest_first(open_files(tmp_path))[0] == "step-00000015"
    save_steps(tmp_path, 20)
    assert restored_step(tmp_path) == 20


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    run = open_run(tmp_path)
    run.save(5, fragments(make_arrays(77), 1, 0)[0], {"again": True})
    run.finish()
    ranks = fragments(make_arrays(), 1, 0, blank=True)
    assert restore(tmp_path, ranks[0], Control.alone()).state == {"again": True}
    assert holds(ranks, make_arrays(77))
    assert sorted(path.name for path in tmp_path.iterdir() if "step" in path.name) == ["step-00000005"]


def test_retention_keeps_the_newest_and_counts_intact_steps(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert steps_newest_first(open_files(tmp_path)) == ["step-00000004", "step-00000003"]
    (tmp_path / "step-00000004/rank-00000.safetensors").write_bytes(b"short")
    save_steps(tmp_path, 5, keep=2)
    assert steps_newest_first(open_files(tmp_path)) == ["step-00000005", "step-00000004", "step-00000003"]


def test_a_skipped_save_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def skip(*_: object) -> tuple[dict[str, str], bytes]:
        return {"skip": "the disk is slower than the schedule"}, b""

    monkeypatch.setattr(Save, "_decide", skip)
    config = CheckpointConfig(mode="sync", timeout=60.0)

    def body(control: Control) -> str:
        run = Checkpointer(tmp_path, control, config)
        run.save(1, fragments(make_arrays(), 3, 0)[control.rank], {})
        (report,) = run.finish()
        return report.outcome

    assert together(3, body) == ["skipped"] * 3
    assert caplog.text.count("step 1 was not saved") == 1


def test_leftovers_of_crashed_saves_are_cleared_or_undone(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step-00000003.tmp-0123456789ab").mkdir()
    (tmp_path / "step-00000001.deleted-01234567").mkdir()
    (tmp_path / "step-00000001.tmp-0123456789ab.deleted-01234567").mkdir()  # as they were once named
    (tmp_path / "step-00000003.replaced-01234567.deleted-01234567").mkdir()
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000002.replaced-01234567")
    open_run(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir() if "step" in path.name) == ["step-00000001", "step-00000002"]


def test_failed_deletions_are_retried_and_block_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    delete = shutil.rmtree
    busy = True

    def rmtree(path: Path) -> None:
        if busy and ("step-00000001" in path.name or "step-00000003" in path.name):
            raise OSError(errno.ENOTEMPTY, "somebody reads it")
        delete(path)

    def names() -> list[str]:
        return [path.name.partition("deleted")[0] for path in sorted(tmp_path.iterdir()) if "step" in path.name]

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save_steps(tmp_path, 1, 2, 3, 3, 4, keep=1)
    left = ["step-00000001.", "step-00000003.", "step-00000003.replaced-", "step-00000004"]
    assert [name[: len(want)] for name, want in zip(names(), left, strict=True)] == left
    assert "somebody reads it" in caplog.text
    run = open_run(tmp_path, keep=1)
    busy = False
    run.save(5, fragments(make_arrays(5), 1, 0)[0], {})
    run.finish()
    assert names() == ["step-00000005"]


def test_small_files_of_killed_saves_are_cleared(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    for name in (".LATEST.0123abcd", ".run.json.89abcdef"):
        (tmp_path / name).write_text("step-00000009\n")
    (tmp_path / ".LATEST.notes").write_text("mine")
    open_run(tmp_path).finish()
    assert {path.name for path in tmp_path.glob(".LATEST*")} == {".LATEST.notes"}
    assert not list(tmp_path.glob(".run.json.*"))


def test_old_steps_go_first_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two old steps and keep=1: one of them may go before the new one is written, and the other may not."""
    save_steps(tmp_path, 1, 2)
    usage = shutil.disk_usage(tmp_path)
    run = open_run(tmp_path, mode="async", keep=1)

    def nearly_full(path: Path) -> object:
        return usage._replace(free=1)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    run.save(3, fragments(make_arrays(3), 1, 0)[0], {}, hold=True)
    run.before_update()
    assert steps_newest_first(open_files(tmp_path)) == ["step-00000002"]
    assert "checkpoint.keep" in caplog.text and "GiB free" in caplog.text
    run.confirm(3)
    run.finish()
    assert steps_newest_first(open_files(tmp_path)) == ["step-00000003"]


def test_nothing_goes_first_where_there_is_room(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    run = open_run(tmp_path, mode="async", keep=1)
    run.save(3, fragments(make_arrays(3), 1, 0)[0], {}, hold=True)
    run.before_update()
    assert steps_newest_first(open_files(tmp_path)) == ["step-00000002", "step-00000001"]
    run.confirm(3)
    run.finish()


def test_any_error_after_the_commit_does_not_block_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(tmp_path, mode="async")

    def prune(keep: int) -> list[str]:
        raise KeyError("a library's own error")

    monkeypatch.setattr(run._target, "prune", prune)
    run.save(1, fragments(make_arrays(1), 1, 0)[0], {})
    run.before_update()
    ending = threading.Thread(target=run.finish, daemon=True)
    ending.start()
    ending.join(20)
    assert not ending.is_alive()
    assert "a library's own error" in caplog.text
    assert restored_step(tmp_path) == 1


def test_full_disk_aborts_the_save_on_all_ranks_not_training(tmp_path: Path) -> None:
    def full(boundary: str, amount: int) -> int:
        if boundary == "manifest.write.before":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return amount

    ranks = fragments(make_arrays(), 2, 1)

    def body(control: Control) -> list[str]:
        run = Checkpointer(tmp_path, control, CheckpointConfig(mode="sync", timeout=60))
        run.save(1, ranks[control.rank], {})
        if control.rank == 0:
            faults.install(full)
        together_again(control)
        run.save(2, ranks[control.rank], {})
        together_again(control)
        faults.install(None)
        run.save(3, ranks[control.rank], {})
        return [report.outcome for report in run.poll()] + [report.outcome for report in run.finish()]

    def together_again(control: Control) -> None:
        talk = control.begin("test", 20)
        talk.agree("here", b"", b"".join, lambda _: b"")
        talk.leave()

    assert together(2, body) == [["committed", "failed", "committed"]] * 2
    assert steps_newest_first(open_files(tmp_path)) == ["step-00000003", "step-00000001"]
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_repeated_or_final_save_failures_fail_the_run(tmp_path: Path) -> None:
    def broken(boundary: str, amount: int) -> int:
        if boundary == "manifest.write.before":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return amount

    run = open_run(tmp_path, failures=2)
    faults.install(broken)
    ranks = fragments(make_arrays(), 1, 0)
    run.save(1, ranks[0], {})
    assert [(report.outcome, report.culprit) for report in run.poll()] == [("failed", 0)]
    run.save(2, ranks[0], {})
    with pytest.raises(SavesFailed, match="2 saves in a row failed") as error:
        run.poll()
    assert [report.step for report in error.value.reports] == [2]
    with pytest.raises(CheckpointError, match="the last save, at step 2, failed"):
        run.finish()


def test_a_silent_rank_ends_the_save_of_the_others_by_time_out(tmp_path: Path) -> None:
    ranks = fragments(make_arrays(), 2, 1)

    def body(control: Control) -> SaveReport:
        run = Checkpointer(tmp_path, control, CheckpointConfig(mode="sync", timeout=0.3))
        if control.rank == 1:
            run.close()
            return SaveReport(1)
        run.save(1, ranks[0], {})
        (report,) = run.poll()
        run.close()
        return report

    reason, culprit = (report := together(2, body)[0]).reason, report.culprit
    assert culprit == 1 and "missing: rank 1" in reason and "checkpoint.timeout" in reason
    assert find_latest(tmp_path) is None


def test_holes_and_contradictions_between_ranks_are_refused(tmp_path: Path) -> None:
    def outcome(ranks: list[list[Fragment]]) -> str:
        def body(control: Control) -> str:
            run = Checkpointer(tmp_path, control, CheckpointConfig(mode="sync", timeout=60))
            run.save(1, ranks[control.rank], {})
            report = run.poll()[0]
            run.close()
            return report.outcome + " " + report.reason

        return together(2, body)[0]

    def part(low: int, high: int, shape: tuple[int, ...] = (8, 2), dtype: torch.dtype = torch.float32) -> Fragment:
        return Fragment("w", "weight", shape, Box((low, 0), (high - low, 2)), torch.zeros(high - low, 2, dtype=dtype))

    assert outcome([[part(0, 4)], [part(4, 8)]]).startswith("committed")
    assert "weight/w" in outcome([[part(0, 4)], [part(5, 8)]])
    assert "rank 1 holds it as" in outcome([[part(0, 4)], [part(4, 8, dtype=torch.float64)]])
    assert outcome([[part(0, 5)], [part(0, 8)]]).startswith("committed")  # overlapping, but one of them is enough


def test_the_plan_is_made_anew_when_only_one_rank_changes(tmp_path: Path) -> None:
    arrays = make_arrays()
    first, second = fragments(arrays, 2, 1), fragments(make_arrays(1), 2, 1)
    extra = torch.randn(3)
    second[1].append(Fragment("late", "weight", (3,), Box.whole((3,)), extra))

    def body(control: Control) -> None:
        run = Checkpointer(tmp_path, control, CheckpointConfig(mode="async", timeout=60))
        for step, ranks in ((1, first), (2, second), (3, first)):
            run.save(step, ranks[control.rank], {}, required=True)
            run.before_update()
        run.finish()

    together(2, body)
    back = torch.zeros(3)
    report = restore(
        tmp_path / "step-00000002", [Fragment("late", "weight", (3,), Box.whole((3,)), back)], Control.alone(), strict=False
    )
    assert torch.equal(back, extra)
    assert len(report.unused) == len(arrays)


@pytest.mark.parametrize("what", ["flip", "cut", "zero", "missing", "leaves", "manifest"])
def test_damage_is_named_and_an_older_step_is_taken(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(tmp_path, 1, 2)
    step = tmp_path / "step-00000002"
    data = step / "rank-00000.safetensors"
    size = data.stat().st_size
    if what == "flip":
        content = bytearray(data.read_bytes())
        content[-100] ^= 4
        data.write_bytes(content)
    elif what == "cut":
        os.truncate(data, size - 1)
    elif what == "zero":
        data.write_bytes(data.read_bytes()[:-500] + bytes(500))
    elif what == "missing":
        data.unlink()
    elif what == "leaves":
        leaves = bytearray((step / "rank-00000.leaves").read_bytes())
        leaves[0] ^= 1
        (step / "rank-00000.leaves").write_bytes(leaves)
    else:
        (step / "manifest.json").write_text((step / "manifest.json").read_text().replace('"step": 2', '"step": 3'))
    ranks = fragments(make_arrays(), 1, 0, blank=True)
    with pytest.raises(DamageError, match="manifest.json" if what == "manifest" else "rank-00000"):
        restore(step, ranks[0], Control.alone())
    assert all(bool((f.tensor == 77).all()) for f in ranks[0])
    assert restored_step(tmp_path) == 1
    assert "is passed over" in caplog.text


def test_slow_disk_skips_saves_but_never_a_required_one(tmp_path: Path) -> None:
    slow = Gate("report.before")
    faults.install(slow)
    run = open_run(tmp_path, mode="async", timeout=60.0, host_memory_gib=2.1 / 1024)
    ranks = fragments(make_arrays(), 1, 0)
    for step in range(1, 6):
        run.save(step, ranks[0], {})
        run.before_update()
    reports = told_of(run, 2, 3, 4, 5)
    run.save(6, ranks[0], {}, required=True)
    slow.open.set()
    run.before_update()
    reports += run.finish()
    outcomes = {report.step: report.outcome for report in reports}
    assert outcomes == {1: "committed", **dict.fromkeys(range(2, 6), "skipped"), 6: "committed"}
    assert reports[-1].step == 6
    assert max(report.host_memory_bytes for report in reports) <= 2.1 * 2**20


def test_snapshot_above_the_memory_limit_is_refused_by_key(tmp_path: Path) -> None:
    run = open_run(tmp_path, host_memory_gib=1e-6)
    run.save(1, fragments(make_arrays(), 1, 0)[0], {})
    assert "checkpoint.host_memory_gib" in run.poll()[0].reason
    run.close()


def test_memory_too_small_for_kept_and_next_is_refused_by_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = open_run(tmp_path, memory_every=1, host_memory_gib=3.0 / 1024)  # a snapshot takes 2 MiB
    run.prepare(fragments(make_arrays(1), 1, 0)[0])
    assert re.search(r"2 snapshots.*checkpoint\.host_memory_gib", caplog.text), "said at once"
    run.save(1, fragments(make_arrays(1), 1, 0)[0], {})
    assert "checkpoint.memory_every" in run.poll()[0].reason
    run.close()


def test_a_snapshot_is_of_the_values_before_the_update(tmp_path: Path) -> None:
    run = open_run(tmp_path, mode="async")
    ranks = fragments(make_arrays(), 1, 0)
    for step in (1, 2, 3):
        for fragment in ranks[0]:
            fragment.tensor.fill_(step)
        run.save(step, ranks[0], {}, required=True)
        run.before_update()
        for fragment in ranks[0]:
            fragment.tensor.fill_(99)
    run.finish()
    for step in (1, 2, 3):
        back = fragments(make_arrays(), 1, 0, blank=True)
        restore(tmp_path / f"step-{step:08d}", back[0], Control.alone())
        assert all(bool((f.tensor == step).all()) for f in back[0])


def test_held_save_is_committed_only_when_confirmed(tmp_path: Path) -> None:
    run = open_run(tmp_path, mode="async")
    for step in (1, 2):
        run.save(step, fragments(make_arrays(step), 1, 0)[0], {}, hold=True)
        run.before_update()
    time.sleep(0.4)
    assert not run.poll() and not list(tmp_path.glob("step-????????"))
    run.confirm(2)
    time.sleep(0.1)
    assert not list(tmp_path.glob("step-????????")), "saves are committed in order"
    run.confirm(1)
    assert [report.outcome for report in run.wait()] == ["committed", "committed"]
    run.save(3, fragments(make_arrays(3), 1, 0)[0], {}, hold=True)
    run.before_update()
    run.close()
    assert restored_step(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000002"]


def test_a_save_that_was_never_confirmed_is_a_failed_one(tmp_path: Path) -> None:
    run = open_run(tmp_path, mode="async")
    run.save(1, fragments(make_arrays(1), 1, 0)[0], {}, hold=True)
    with pytest.raises(CheckpointError, match="known to be good"):
        run.finish()


def test_a_bad_config_names_its_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        open_run(tmp_path, mode="later", keep=-1)
    assert {problem.key for problem in error.value.problems} == {"checkpoint.mode", "checkpoint.keep"}


def test_old_step_deleted_by_somebody_else_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    delete = shutil.rmtree

    def rmtree(path: Path) -> None:
        delete(path)
        raise FileNotFoundError(errno.ENOENT, "it has gone", str(path))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save_steps(tmp_path, 1, 2, keep=1)
    assert "could not be deleted" not in caplog.text
