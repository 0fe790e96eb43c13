"""The ranking of runs: finished before unfinished, and diverged ones last; validation and training losses are not mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshloom.launch.ranking import Standing, compared_losses, ranked
from meshloom.launch.run_metrics import Metrics
from meshloom.launch.sweep_results import rows
from support.run_folders import step_row


def test_finished_runs_come_first_and_those_without_a_loss_last() -> None:
    runs = [Standing(None, None), Standing(1.0, 1.0, finished=False), Standing(9.0, 3.0), Standing(8.0, 2.0)]
    assert ranked(runs) == [3, 2, 1, 0]
    assert ranked([]) == []


def test_a_training_loss_is_not_compared_with_a_validation_loss() -> None:
    runs = [Standing(1.0, None), Standing(3.0, 3.5)]
    assert compared_losses(runs) == [None, 3.5] and ranked(runs) == [1, 0]
    assert compared_losses([Standing(1.0, None), Standing(3.0, None)]) == [1.0, 3.0]


def test_the_table_of_a_sweep_ranks_as_the_report_does(tmp_path: Path) -> None:
    lost = {name: value for name, value in step_row(3).items() if name != "loss"}
    written = {
        "a_diverged": [step_row(2), {"step": 2, "eval_loss": 0.5}, lost],
        "b_unvalidated": [step_row(2, loss=0.1)],
        "c_good": [step_row(2), {"step": 2, "eval_loss": 2.0}],
    }
    for name, found in written.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in found))
    assert [row.split()[0] for row in rows(tmp_path)] == ["c_good", "b_unvalidated", "a_diverged"]


def test_the_table_of_a_sweep_reads_lengths_where_the_folders_tell_them(tmp_path: Path) -> None:
    """A run that is far below its length has an early evaluation's loss: it is not compared with those that are done."""
    written = {
        "a_stopped": (1.0, "trainer: {steps: 9, tokens: null}"),
        "b_done": (3.0, "trainer: {steps: 2, tokens: null}"),
        "c_unreadable": (2.0, "trainer: ["),
        "d_short_of_tokens": (0.5, "trainer: {steps: null, tokens: 1000000000}"),
    }
    for name, (loss, config) in written.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(config)
        found = [step_row(2), {"step": 2, "eval_loss": loss}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in found))
    told = rows(tmp_path)
    assert [row.split()[0] for row in told] == ["c_unreadable", "b_done", "d_short_of_tokens", "a_stopped"]
    assert told[3].endswith("of 9 steps") and told[2].endswith("of 1,000,000,000 tokens") and "of" not in told[1].split()


def test_the_table_of_a_sweep_knows_finished_runs_of_older_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose rows had no `tokens_per_second`. Each file is read once."""
    written = {
        "a_stopped": [{"step": 2, "loss": 1.0, "tokens": 20}],
        "b_done": [{"step": 9, "loss": 3.0, "tokens": 90}, {"step": 10, "checkpoint_step": 9}],
    }
    for name, found in written.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("trainer: {steps: 9}")
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in found))
    read, seen = Metrics.read, list[Path]()
    monkeypatch.setattr(Metrics, "read", lambda path: (seen.append(path), read(path))[1])
    assert [row.split()[0] for row in rows(tmp_path)] == ["b_done", "a_stopped"]
    assert len(seen) == 2
