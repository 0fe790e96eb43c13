"""Whole runs that go back: after a spike without its samples, after a flipped bit to the losses of an undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshloom.checkpoint.folder import step_name
from meshloom.checkpoint.restore import read_manifest
from meshloom.trainer.guard import spikes
from meshloom.trainer.guard.journal import read_journal
from meshloom.trainer.watch.incidents import read_incidents
from support.ranks import run_ranks
from support.tiny_run import unpicklable_run


def trained(rank: int, world_size: int, words: list[str]) -> int:
    """Exit code of a run whose statistic is ready after four steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikes, "WARM_UP", 4)
        return unpicklable_run(rank, world_size, words)


def run(ranks: int, folder: Path, *words: str) -> list[float]:
    """The losses of a run that reached its end."""
    common = [f"output_dir={folder}", "checkpoint.every=3", "trainer.eval_every=0", "parallel.zero=0"]
    assert run_ranks(ranks, trained, [*common, *words]) == [0] * ranks
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def hook(name: str, **keys: float) -> str:
    written = ",".join(f"{key}:{value}" for key, value in keys.items())
    return f"trainer.hooks=[{{_target_:support.run_hooks.{name},{written}}}]"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_flipped_bit_is_noticed_and_costs_no_loss(tmp_path: Path, mode: str) -> None:
    words = ["trainer.steps=8", f"checkpoint.mode={mode}", "trainer.compare_replicas_every=1"]
    whole = run(1, tmp_path / "whole", *words)
    found = run(3, tmp_path / "flipped", *words, hook("FlipBit", step=5, rank=1))
    assert found == pytest.approx(whole, rel=1e-9)
    incidents = list(read_incidents(tmp_path / "flipped"))
    assert [each["kind"] for each in incidents] == ["replicas_differ"]  # two of three agree: nothing is left to be judged
    assert (incidents[0]["step"], incidents[0]["rank"], incidents[0]["details"]["odd"]) == (5, 1, [1])
    assert "weight/norm.weight" in incidents[0]["details"]["arrays"]
    (rewind,) = read_journal(tmp_path / "flipped" / "checkpoints")
    assert (rewind["step"], rewind["to"], rewind["ranges"]) == (5, 3, [])


@pytest.mark.parametrize(
    "early",  # what makes the numbers of a step known before its copies are compared
    [["trainer.eval_every=6"], ["batch=critical_loss", "batch.max=8", "batch.alpha=0.1", "batch.tokens=1e6"]],
    ids=["evaluation", "controller"],
)
def test_of_two_copies_a_replay_tells_which_was_wrong(tmp_path: Path, early: list[str]) -> None:
    """At a step that is saved, and the last: neither the save nor the end of the run comes before the comparison."""
    run(2, tmp_path, "trainer.steps=6", "trainer.compare_replicas_every=0", hook("FlipBit", step=5, rank=0), *early)
    first, second = read_incidents(tmp_path)
    assert (first["step"], first["rank"], first["details"]["odd"]) == (6, None, [0, 1])
    assert second["kind"] == "replicas_judged" and second["rank"] == 0 and "the copy of rank 0 was wrong" in second["message"]
    (rewind,) = read_journal(tmp_path / "checkpoints")
    assert (rewind["step"], rewind["to"]) == (6, 3)


def test_after_a_spike_the_run_goes_back_and_leaves_its_samples_out(tmp_path: Path) -> None:
    """The oracle: a run that is told from its beginning to leave these samples out."""
    words = ["trainer.steps=10", "trainer.on_bad_step=rewind"]
    found = run(2, tmp_path / "spiked", *words, hook("Jolt", first=8, last=8))
    (rewind,) = read_journal(tmp_path / "spiked" / "checkpoints")
    assert (rewind["step"], rewind["to"], rewind["ranges"]) == (8, 6, [[56, 64]])
    assert len(found) == 10 and found[7] == 0.0  # no sample of the step is left
    told = tmp_path / "told" / "checkpoints"
    told.mkdir(parents=True)
    (told / "rewinds.json").write_text(json.dumps({"rewinds": [rewind]}))
    assert run(1, tmp_path / "told", *words, "resume=auto") == pytest.approx(found, rel=1e-9)


def test_as_many_spikes_as_the_limit_are_a_new_level(tmp_path: Path) -> None:
    """Each leaves out other samples, so it is not these."""
    words = ["trainer.steps=12", "trainer.on_bad_step=rewind", "trainer.bad_step_limit=2"]
    assert len(run(1, tmp_path, *words, hook("Jolt", first=8, last=12))) == 12
    assert [(each["step"], each["to"]) for each in read_journal(tmp_path / "checkpoints")] == [(8, 6)]
    assert [(each["kind"], each["step"]) for each in read_incidents(tmp_path)] == [
        ("bad_step", 8),
        ("bad_step", 9),
        ("new_level", 9),
    ]


def test_before_the_first_checkpoint_a_spike_is_left_out_in_place(tmp_path: Path) -> None:
    """At the very step of the first save, too, which reads the step's numbers: then that is given up, and done again."""
    words = ["trainer.steps=7", "trainer.on_bad_step=rewind", "checkpoint.every=6"]
    found = run(1, tmp_path, *words, hook("Jolt", first=6, last=6))
    (rewind,) = read_journal(tmp_path / "checkpoints")
    assert (rewind["step"], rewind["to"], rewind["in_place"]) == (6, 5, True)
    assert len(found) == 7 and found[5] == 0.0
    assert read_manifest(tmp_path / "checkpoints" / step_name(6)).state["progress"]["step"] == 6
