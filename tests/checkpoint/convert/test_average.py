"""The mean of several steps: by hand, by weight, refused for other models, and a checkpoint like any import."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meshloom.checkpoint.convert.compose import Source, compose
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.reading.compare import read_array
from meshloom.data.tokenizing.tokenizer import Tokenizer
from meshloom.launch.checkpoint import main
from meshloom.launch.generate import main as generate
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from support.configs import resolve_words
from support.ranks import run_ranks
from support.tiny_run import TINY, train

SHAPE: dict[str, Any] = {"dim": 16, "layers": 2, "heads": 2, "kv_heads": 1, "ffn_dim": 24, "vocabulary": 257}
CONFIG = DecoderConfig.of(SHAPE)


def save(folder: Path, step: int, dtype: torch.dtype = torch.float32, **state: Any) -> dict[str, torch.Tensor]:
    """A step with random weights, and an optimizer's state that has no place in a mean. Returns the weights."""
    draw = torch.Generator().manual_seed(step)
    weights = {
        name: torch.randn(value.shape, generator=draw).mul(0.1).to(dtype) for name, value in Decoder(CONFIG).named_parameters()
    }
    sources = [Source(name, "weight", dtype, tuple(value.shape), value.clone) for name, value in weights.items()]
    sources += [Source("norm.weight", "exp_avg", torch.float32, (16,), lambda: torch.ones(16))]
    compose(folder, step, sources, {"config": {"model": dataclasses.asdict(CONFIG)}, "imported_from": {"format": "x"}, **state})
    return weights


def averaged(folder: Path) -> dict[str, torch.Tensor]:
    files = open_files(folder / "step-00000000")
    manifest = load_manifest(files)
    assert {array.role for array in manifest.arrays.values()} == {"weight"}
    return {array.name: read_array(files, manifest, array.key) for array in manifest.arrays.values()}


@pytest.fixture
def steps(tmp_path: Path) -> list[dict[str, torch.Tensor]]:
    return [save(tmp_path / "run" / str(step), step) for step in (1, 2, 3)]


@pytest.mark.parametrize(("words", "shares"), [([], [1, 1, 1]), (["--weights", "1", "0", "3"], [1, 0, 3])])
def test_each_weight_is_the_mean(
    tmp_path: Path, steps: list[dict[str, torch.Tensor]], words: list[str], shares: list[float]
) -> None:
    folders = [str(tmp_path / "run" / str(step)) for step in (1, 2, 3)]
    assert main(["average", *folders, "--output", str(tmp_path / "mean"), *words]) == 0
    found = averaged(tmp_path / "mean")
    assert found.keys() == steps[0].keys()
    for name, value in found.items():
        expected = np.average([each[name].double().numpy() for each in steps], axis=0, weights=shares)
        np.testing.assert_array_equal(value.numpy(), expected.astype(np.float32))
    state = load_manifest(open_files(tmp_path / "mean/step-00000000")).state
    assert state["imported_from"]["weights"] == shares


def test_sums_are_wider_than_the_weights(tmp_path: Path) -> None:
    """In bf16 a mean of two in turn would round twice."""
    weights = [save(tmp_path / str(step), step, torch.bfloat16) for step in (1, 2, 3)]
    assert main(["average", *(str(tmp_path / str(step)) for step in (1, 2, 3)), "--output", str(tmp_path / "mean")]) == 0
    for name, value in averaged(tmp_path / "mean").items():
        exact = sum(each[name].double() for each in weights) / 3
        assert torch.equal(value, exact.to(torch.bfloat16)), name


def test_a_run_s_last_steps_are_averaged_generate_and_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "data.vocabulary=257", "precision=fp32", "trainer.steps=3", "trainer.eval_every=0", "checkpoint.every=1"]
    assert run_ranks(1, train, [*words, f"output_dir={tmp_path}/run"]) == [0]
    assert main(["average", f"{tmp_path}/run", "--last", "2", "--output", f"{tmp_path}/mean"]) == 0
    assert "step-00000003, " in capsys.readouterr().out
    assert main(["average", f"{tmp_path}/run", "--last", "4", "--output", f"{tmp_path}/more"]) == 1
    assert "the run has 3 complete steps" in capsys.readouterr().err
    found = averaged(tmp_path / "mean")
    on = [f"resume={tmp_path}/mean", f"output_dir={tmp_path}/on", "optim.lr=1e-30", "trainer.steps=3", *words[:-3]]
    assert run_ranks(1, train, [*on, "trainer.eval_every=0"]) == [0]
    files = open_files(max((tmp_path / "on/checkpoints").glob("step-*")))
    for name, value in found.items():
        assert torch.equal(read_array(files, load_manifest(files), f"weight/{name}"), value), name
    Tokenizer.bytes().save(tmp_path / "mean/tokenizer.json")
    (tmp_path / "mean/chat_template.jinja").write_text("{{ messages }}")
    assert main(["average", f"{tmp_path}/mean", f"{tmp_path}/mean", "--output", f"{tmp_path}/again"]) == 0
    beside = tmp_path / "again/step-00000000"
    assert (beside / "chat_template.jinja").read_text() == "{{ messages }}" and (beside / "tokenizer.json").is_file()
    assert generate([f"checkpoint={tmp_path}/mean", "prompt=a", "tokens=2"]) == 0
    assert not resolve_words(TINY, [f"resume={tmp_path}/mean", "data.vocabulary=257"]).problems


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["1"], "one step has no average"),
        (["1", "2", "--weights", "1"], "there are 1 weights for 2 steps"),
        (["1", "2", "--weights", "1", "nan"], "are no weights"),
        (["1", "2", "--weights", "0", "0"], "are no weights"),
        (["1", "2", "--last", "2"], "--last goes with one run"),
        (["1", "other"], "is of another model than"),
        (["1", "cut"], "another tokenizer"),
    ],
)
def test_arrays_without_a_mean_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    for step in (1, 2):
        save(tmp_path / str(step), step, tokenizer="a")
    save(tmp_path / "cut", 3, tokenizer="b")
    other = [Source("norm.weight", "weight", torch.float32, (3,), lambda: torch.ones(3))]
    compose(tmp_path / "other", 1, other, {"imported_from": {}})
    named = [str(tmp_path / word) if word in ("1", "2", "other", "cut") and not flag else word for word, flag in marked(words)]
    assert main(["average", *named, "--output", str(tmp_path / "mean")]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "mean").exists()


def marked(words: list[str]) -> list[tuple[str, bool]]:
    """Each word, and whether it stands behind a flag."""
    flags = [at for at, word in enumerate(words) if word.startswith("--")]
    return [(word, bool(flags) and at > flags[0]) for at, word in enumerate(words)]
