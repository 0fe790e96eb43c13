"""Whole runs that go on from a step which has lost a pipeline's stage: on any layout alike, and told for good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from meshloom.checkpoint.rebuild import RebuiltLayers
from meshloom.checkpoint.restore import read_state
from meshloom.config.problems import ConfigError
from meshloom.trainer.find_checkpoint import is_named
from meshloom.trainer.hooks.rebuilt_history import RebuiltHistory
from meshloom.trainer.loop import Loop
from meshloom.trainer.watch.incidents import read_incidents
from support.configs import resolve_words
from support.ranks import run_ranks
from support.tiny_run import TINY, body

WORDS = ["model.layers=3", "optim.betas=[0.9,0.99]", "trainer.eval_every=0"]
AGAIN = ["trainer.steps=5", "checkpoint.lost_layers=neighbours"]


def go(ranks: int, folder: Path, *words: str) -> list[int]:
    return run_ranks(ranks, body, [f"output_dir={folder}", *WORDS, *words])


def losses(folder: Path) -> dict[int, Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step that three stages of a layer each have saved, without the file of the second."""
    folder = tmp_path_factory.mktemp("pipeline")
    assert go(3, folder, "parallel.pp=3", "trainer.steps=3") == [0] * 3
    step = folder / "checkpoints/step-00000003"
    (step / "rank-00001.safetensors").unlink()
    return step


def test_a_run_goes_on_from_rebuilt_layers_on_any_layout(tmp_path: Path, broken: Path) -> None:
    """With the same losses. That they are not those of its recipe stays in its checkpoints, also of later starts."""
    for ranks, words in ((1, []), (2, ["parallel.tp=2"])):
        assert go(ranks, tmp_path / str(ranks), *AGAIN, *words, f"resume={broken}") == [0] * ranks
    assert list(losses(tmp_path / "1")) == [4, 5]
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-9)
    state = read_state(tmp_path / "1/checkpoints/step-00000005")
    (kept,) = state["hooks"]["RebuiltHistory"]["rebuilt"]
    assert kept["step"] == 3 and kept["layers"][0]["lost"] == [1]
    assert state["guard"]["accepted"] == 2, "the statistic of losses before would take the jump for a spike"
    assert go(1, tmp_path / "1", "trainer.steps=6", "resume=auto") == [0]
    (incident,) = (row for row in read_incidents(tmp_path / "1") if row["kind"] == "layers_rebuilt")
    assert "layers.1 from 0 and 2" in incident["message"] and incident["details"] == kept
    assert read_state(tmp_path / "1/checkpoints/step-00000006")["hooks"]["RebuiltHistory"] == {"rebuilt": [kept]}


def test_a_later_start_says_that_layers_were_rebuilt(caplog: pytest.LogCaptureFixture) -> None:
    hook = RebuiltHistory()
    hook.load_state_dict({"rebuilt": [{"step": 3}]})
    hook.add(9, [RebuiltLayers("layers", [1], [0], [2], [0.25, 0.75], "second moments")], ["a file is missing"])
    hook.on_run_begin(cast(Loop, None))
    assert "step 9 had lost 1 file" in caplog.text and "layers.1 from 0 and 2 (0.25 and 0.75" in caplog.text
    assert "rebuilt from their neighbours at step 3: losses depend on it" in caplog.text


@pytest.mark.parametrize("resume", ["none", "auto", "another name"])
def test_a_step_to_rebuild_must_be_named(tmp_path: Path, broken: Path, resume: str) -> None:
    if resume == "another name":
        (tmp_path / "kept").symlink_to(broken)
        resume = str(tmp_path / "kept")
    words = [f"output_dir={tmp_path}", *AGAIN, f"resume={resume}"]
    with pytest.raises(ConfigError, match=r"checkpoint.lost_layers.*name the step"):
        resolve_words(TINY, [*WORDS, *words], 1).refuse()


def test_a_mixture_is_refused(tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path}", *AGAIN, "model.experts.count=4", "model.experts.top_k=2", "resume=none"]
    with pytest.raises(ConfigError, match=r"checkpoint.lost_layers: experts of different layers"):
        resolve_words(TINY, [*WORDS, *words], 1).refuse()


def test_only_the_named_step_is_rebuilt(tmp_path: Path) -> None:
    """A run that goes back by itself is handed its folder of checkpoints, or another step of it."""
    step = tmp_path / "step-00000003"
    assert is_named(step, str(step)) and is_named(str(step), f"{tmp_path}/../{tmp_path.name}/step-00000003/")
    assert not is_named(tmp_path, str(step)) and not is_named(tmp_path / "step-00000002", str(step))
    assert is_named("s3://a/step-00000003", "s3://a/step-00000003/") and not is_named("s3://a", "s3://a/step-00000003")


def test_layers_are_rebuilt_from_those_of_their_kind(tmp_path: Path) -> None:
    """Every other layer slides, so the layers beside a lost one are of the other kind: refused, and by name."""
    words = ["model.layer_types=[sliding,full]", "model.sliding_window=4"]
    assert go(3, tmp_path / "a", "parallel.pp=3", "trainer.steps=3", *words) == [0] * 3
    step = tmp_path / "a/checkpoints/step-00000003"
    (step / "rank-00001.safetensors").unlink()
    with pytest.raises(BaseException, match=r"layers.1 has no layer of its kind \(full\) before it"):
        go(1, tmp_path / "b", *AGAIN, *words, f"resume={step}")


def test_another_optimizer_begins_anew_beside_rebuilt_weights(tmp_path: Path) -> None:
    """State of the old one is of a kind that is not rebuilt: with that optimizer it is refused, with another one left out."""
    assert go(3, tmp_path / "a", "parallel.pp=3", "trainer.steps=3", "optim=ademamix") == [0] * 3
    step = tmp_path / "a/checkpoints/step-00000003"
    (step / "rank-00001.safetensors").unlink()
    with pytest.raises(BaseException, match="is state of a kind that is not rebuilt"):
        go(1, tmp_path / "b", *AGAIN, "optim=ademamix", f"resume={step}")
    assert go(1, tmp_path / "c", *AGAIN, "optim=adamw", "checkpoint.strict=false", f"resume={step}") == [0]
    assert list(losses(tmp_path / "c")) == [4, 5]
