"""`meshloom hparams`, and values that a config leaves to a law."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from meshloom.launch.hparams import HparamsArguments, main, recommend
from meshloom.trainer.automatic import hidden_parameters, resolve_automatic
from meshloom.trainer.build import build_model
from meshloom.trainer.typed import replace_keys
from meshloom.trainer.validate import run_problems
from support.configs import config_of


def test_recommendations_for_llama_1b() -> None:
    """Llama 1B: 16 layers of 2·2048² (q, o) + 2·2048·512 (k, v) + 3·2048·8192 and two norms; and the final norm."""
    found = recommend(HparamsArguments(model="llama_1b", tokens="100B", seq_len=4096))
    assert found.hidden == 16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048) + 2048
    assert found.parameters == found.hidden + 2 * 128_256 * 2048
    assert found.rows[0].value == f"{1.79 * found.hidden**-0.713 * 1e11**0.307:.3e}"
    assert found.rows[1].value == "1.108 M tokens\n272 sequences"  # 270.4 of 4,096, to the nearest multiple of 8
    assert found.mup.width == 8
    assert not found.rows[0].extrapolated
    assert recommend(HparamsArguments(model="llama_8b", tokens="1T")).rows[0].extrapolated == "N = 6.98 B, D = 1 T"


def test_active_parameters_of_a_mixture_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 8 experts a token chooses 2, in every layer: 6 of 8 feed-forwards less than in all."""
    found = recommend(HparamsArguments(recipe="moe_tiny", tokens="1B"))
    model = config_of("recipe=moe_tiny").model.decoder()
    assert model is not None
    experts = model.experts
    idle = (experts.count - experts.top_k) * 3 * model.dim * (experts.ffn_dim or model.ffn_dim) * len(model.mixture_layers())
    assert found.parameters - found.active == idle > 0
    assert main(["recipe=moe_tiny", "tokens=1B"]) == 0
    assert " of them active), " in capsys.readouterr().out
    dense = recommend(HparamsArguments(recipe="llama_1b", tokens="1B"))
    assert dense.parameters == dense.active


@pytest.mark.parametrize("name", ["step_overrides", "power_overrides"])
@pytest.mark.parametrize(
    "asked", [HparamsArguments(recipe="llama_8b", tokens="200B"), HparamsArguments(model="llama_tiny", tokens="2B")]
)
def test_the_printed_command_runs_as_it_stands(name: str, asked: HparamsArguments) -> None:
    found = recommend(asked)
    config = config_of(*found.base, *getattr(found, name))
    assert run_problems(config, world_size=1) == []
    assert config.trainer.tokens == (200_000_000_000 if asked.recipe else 2_000_000_000)
    assert config.batch.samples % 8 == 0


def test_overrides_sit_on_the_recipe_that_is_named() -> None:
    """Its precision, micro-batch and length of sequences are the run's, so they are what the numbers are meant for."""
    found = recommend(HparamsArguments(recipe="llama_3b", tokens="100B"))
    assert found.base == ["recipe=llama_3b"]
    assert "precision=bf16 batch.micro=auto" in found.setting
    assert "data.seq_len=8192" in found.step_overrides
    assert recommend(HparamsArguments(model="llama_3b", tokens="100B")).base == ["recipe=llama_3b"]
    assert recommend(HparamsArguments(model="llama_tiny", tokens="1B")).base == ["recipe=quickstart", "model=llama_tiny"]
    assert recommend(HparamsArguments(recipe="llama_1b", model="llama_3b", tokens="1B")).base == [
        "recipe=llama_1b",
        "model=llama_3b",
    ]


def test_a_recipe_of_ones_own_is_built_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe").mkdir()
    own = "# @package _global_\ndefaults:\n  - /recipe/llama_1b\n  - _self_\nrecipe: mine\nbatch:\n  micro: 3\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(own)
    found = recommend(HparamsArguments(recipe="mine", tokens="100B", config_dir=str(tmp_path)))
    samples = next(int(word.partition("=")[2]) for word in found.step_overrides if word.startswith("batch.samples="))
    assert samples % 24 == 0
    for words in (["--config-dir", str(tmp_path)], [f"config_dir={tmp_path}"]):
        assert main([*words, "recipe=mine", "tokens=100B"]) == 0
        printed = capsys.readouterr().out
        assert printed.count(f"\nmeshloom train --config-dir={tmp_path} recipe=mine optim.lr=") == 1
        assert printed.count(f"\nmeshloom train --config-dir={tmp_path} recipe=mine schedule=power") == 1


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=llama_1b", "tokens=100B", "loss=2.5", "seq_len=4096"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "1.664e-03",
        "arXiv 2503.04715",
        "2.675 M tokens",
        "meshloom train recipe=llama_1b optim.lr=1.664e-03",
        "m_width 8",
    ):
        assert text in printed
    assert main(["model=llama_1", "tokens=1 mile", "seq_len=0"]) == 2
    refused = capsys.readouterr().err
    assert all(text in refused for text in ("3 problems", "model=llama_1b?", "tokens: '1 mile'", "seq_len: 0"))
    assert main(["model=llama_1b", "tokens=1B", "batch=0", "loss=-1"]) == 2
    refused = capsys.readouterr().err
    assert "batch: 0 is not positive" in refused and "loss: -1.0 is not positive" in refused
    assert main(["tokens=1B"]) == 2
    assert "recipe: is not given" in capsys.readouterr().err


def test_a_recommendation_that_can_not_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe=llama_1b", "tokens=100M"]) == 0
    assert "schedule.warmup: 2000 steps is longer than the run" in capsys.readouterr().out


def test_automatic_values_become_numbers() -> None:
    overrides = ["model=llama_1b", "data=synthetic", "data.seq_len=2048", "trainer.steps=null", "trainer.tokens=100000000000"]
    left = config_of(*overrides, "optim.lr=auto:step_law", "batch.samples=auto:step_law", "batch.micro=4")
    before = copy.deepcopy(left)
    config, found = resolve_automatic(left)
    assert found == [] and left == before, "another config is made"
    assert config.batch.samples == 541  # 1.1077e6 / 2048 = 540.9
    ramp = config_of(*overrides, "batch=ramp", "batch.samples=auto:step_law", "batch.multiple=32", "batch.max=1024")
    rounded, found = resolve_automatic(ramp)
    assert found == [] and rounded.batch.samples == 544
    assert config.optim.lr == pytest.approx(1.79 * hidden_parameters(config) ** -0.713 * 1e11**0.307, rel=1e-3)
    assert resolve_automatic(config) == (config, []), "numbers are left alone"


def test_a_lawful_batch_over_the_largest_is_refused() -> None:
    length = ["data=synthetic", "data.seq_len=2048", "trainer.steps=null", "trainer.tokens=100000000000"]
    _, found = resolve_automatic(config_of(*length, "batch=ramp", "batch.samples=auto:step_law", "batch.max=512"))
    assert [str(problem) for problem in found] == ["batch.max: 512 is less than batch.samples=541; raise it"]


def test_automatic_values_that_have_no_answer() -> None:
    config = config_of("optim.lr=auto:moon", "batch.samples=auto:step_law")
    assert [problem.key for problem in resolve_automatic(config)[1]] == ["batch.samples", "optim.lr"]
    _, found = resolve_automatic(replace_keys(config, {"trainer.steps": None, "trainer.tokens": 10**9}))
    assert [str(problem) for problem in found] == [
        "optim.lr: there is no law 'auto:moon' for a learning rate; write one of auto:step_law, auto:power"
    ]
    refused = replace_keys(config, {"optim.lr": "fast"}).optim.problems()
    assert str(refused[0]) == "optim.lr: 'fast' is not a number; write one, or auto:step_law"


@pytest.mark.parametrize(
    "words", [[], ["model.tied=true"], ["model.qk_norm=full", "model.qkv_bias=true", "model.norm_place=around"]]
)
def test_hidden_parameters_are_those_of_the_built_model(words: list[str]) -> None:
    config = config_of("recipe=quickstart", *words)
    model = build_model(config.model, vocabulary=7)
    shared = [model.get_parameter(name) for name in ("embed.weight", "head.weight") if name in dict(model.named_parameters())]
    assert hidden_parameters(config) == sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in shared)


def test_power_schedule_is_not_capped_by_the_power_law() -> None:
    length = ["trainer.steps=null", "trainer.tokens=1000000000", "optim.lr=auto:power", "data=synthetic"]
    (problem,) = resolve_automatic(config_of(*length, "schedule=power"))[1]
    assert problem.key == "optim.lr" and "0.02" in problem.fix
    assert resolve_automatic(config_of(*length))[1] == []
