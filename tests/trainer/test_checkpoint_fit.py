"""Contradictions to a checkpoint are told by key, before anything is built and whatever shapes happen to fit."""

from __future__ import annotations

from typing import Any

import pytest

from meshloom.checkpoint.manifest import Manifest, StoredArray
from meshloom.trainer.checkpoint_fit import checkpoint_problems
from meshloom.trainer.typed import plain_config
from support.configs import config_of

WORDS = ("recipe=quickstart", "model.dim=16", "model.heads=4", "model.kv_heads=2", "model.layers=2", "model.ffn_dim=24")
SHAPES = {
    "embed.weight": (61, 16),
    "layers.0.attention.wq.weight": (16, 16),
    "layers.0.attention.wk.weight": (8, 16),
    "layers.0.ffn.w1.weight": (24, 16),
    "layers.1.ffn.w1.weight": (24, 16),
}


def checkpoint(state: dict[str, Any], tied: bool = True) -> Manifest:
    shapes = SHAPES if tied else {**SHAPES, "head.weight": (61, 16)}
    arrays = [StoredArray(name, "weight", "F32", shape) for name, shape in shapes.items()]
    return Manifest(3, 1, state, [], {array.key: array for array in arrays})


def own(*words: str) -> Manifest:
    """A checkpoint of a run of these words."""
    config = plain_config(config_of(*WORDS, *words))
    return checkpoint({"config": config, "progress": {}, "vocabulary": 61}, tied=config["model"]["tied"])


def imported(**model: Any) -> Manifest:
    """An import that states its model."""
    return checkpoint({"config": {"model": {**plain_config(config_of(*WORDS))["model"], "vocabulary": 61, **model}}})


def keys(manifest: Manifest, *words: str) -> list[str]:
    return [problem.key for problem in checkpoint_problems(manifest, config_of(*WORDS, *words))]


TIED = config_of(*WORDS).model.tied
OTHERS = [
    ("model.dim=32", "model.dim"),
    ("model.layers=1", "model.layers"),
    ("model.ffn_dim=48", "model.ffn_dim"),
    ("model.kv_heads=1", "model.kv_heads"),
    ("model.kv_heads=4", "model.kv_heads"),
    (f"model.tied={str(not TIED).lower()}", "model.tied"),
    ("model.vocabulary=67", "model.vocabulary"),
]


@pytest.mark.parametrize("strict", ["checkpoint.strict=true", "checkpoint.strict=false"])
@pytest.mark.parametrize(("word", "key"), OTHERS)
def test_another_shape_is_refused_by_key(word: str, key: str, strict: str) -> None:
    assert keys(own(), word, strict) == [key] == keys(imported(), word, strict)


def test_heads_of_the_same_product_are_refused() -> None:
    """8 heads over 4 have the arrays of 4 over 2, twice as wide."""
    assert keys(own(), "model.heads=8", "model.kv_heads=4") == ["model.heads", "model.kv_heads"]


def test_every_key_is_named_at_once() -> None:
    assert keys(own(), "model.dim=32", "model.layers=5", "optim=lamb") == ["model.dim", "model.layers", "optim"]


def test_a_typed_recipe_of_another_model_is_one_problem() -> None:
    (problem,) = checkpoint_problems(own(), config_of("recipe=llama_1b"))
    assert problem.key == "recipe" and "model.dim is 2048, and the checkpoint's model has 16; 6 more differ" in problem.message
    assert "leave recipe=… out, and the run goes on with its own, quickstart" in problem.fix


def test_a_run_may_change_what_its_weights_compute() -> None:
    assert keys(own(), "model.rope_theta=1e4", "model.norm_eps=1e-6", "model.init_std=1") == []


def test_another_way_to_write_the_same_model_fits() -> None:
    assert keys(own(), "model.head_dim=4", "model.layer_types=[full,full]") == []
    assert keys(own("model.head_dim=4"), "model.head_dim=null") == []


@pytest.mark.parametrize(
    "word", ["model.rope_scaling.kind=linear", "model.rope_theta=1e4", "model.norm_eps=1e-6", "model.mup_base=8"]
)
def test_an_import_is_not_computed_otherwise_by_accident(word: str) -> None:
    assert word.partition("=")[0] in keys(imported(), word)
    assert keys(imported(), word, "checkpoint.strict=false") == []


@pytest.mark.parametrize(("word", "key"), [pair for pair in OTHERS if pair[0] not in ("model.tied=true", "model.tied=false")])
def test_arrays_tell_the_shape_of_an_import_without_a_config(word: str, key: str) -> None:
    manifest = checkpoint({"imported_from": {"format": "dcp"}}, tied=TIED)
    assert keys(manifest) == [] and keys(manifest, word) == [key]
    assert keys(checkpoint({"imported_from": {"format": "dcp"}}, tied=not TIED)) == ["model.tied"]


@pytest.mark.parametrize("option", ["lamb", "lars", "adagrad"])
def test_another_optimizers_state_is_refused(option: str) -> None:
    assert keys(own(), f"optim={option}") == ["optim"]
    assert keys(own(), f"optim={option}", "checkpoint.strict=false") == []
    assert keys(imported(), f"optim={option}") == []
