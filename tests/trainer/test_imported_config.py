"""A run that begins from an import has the import's model, unless another is typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meshloom.config.compose import Composition
from meshloom.config.problems import ConfigError
from meshloom.data.tokenizing.tokenizer import Tokenizer
from meshloom.trainer.imported_config import import_config
from meshloom.trainer.schema import make_composer

MODEL: dict[str, Any] = {
    "_target_": "meshloom.models.llama.Llama",  # an old name
    "name": "llama",
    "dim": 32,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "ffn_dim": 40,
    "vocabulary": 97,
    "tied": True,
    "norm_eps": 1e-6,
    "rope_theta": 1e4,
}
STATE = {"config": {"model": MODEL}}


def compose(*words: str) -> Composition:
    found = make_composer().compose(words)
    assert found.problems == []
    return found


def test_the_model_is_the_imports_where_nothing_is_typed() -> None:
    words = ["recipe=llama_1b", "optim.lr=0.5", "model.init_std=0.5"]
    found = import_config(STATE, compose(*words), words)
    for name, value in MODEL.items():
        assert name == "_target_" or found.config.model[name] == value, name
    assert found.config.model._target_ == "meshloom.models.decoder.Decoder"
    assert found.config.model.init_std == 0.5 and found.config.optim.lr == 0.5
    assert any("model.rope_theta=10000.0" in line for line in found.notices)


def test_a_typed_model_is_left_for_the_comparison() -> None:
    words = ["recipe=quickstart", "model=llama_1b", "model.rope_theta=3e4", "model.vocabulary=null"]
    found = import_config(STATE, compose(*words), words)
    assert found.config.model.dim == 2048 and found.config.model.rope_theta == 3e4
    assert found.config.model.vocabulary == 97, "it was left open"


def test_an_import_that_states_no_model_takes_todays() -> None:
    found = import_config({"imported_from": {}}, compose("recipe=llama_1b"), ["recipe=llama_1b"])
    assert found.config.model.dim == 2048 and found.notices == []


def test_text_is_cut_by_the_imports_tokenizer() -> None:
    state = {"tokenizer": "1234", "end_of_document": "<end>"}
    words = ["recipe=quickstart", "data=jsonl", "data.input=a.jsonl"]
    found = import_config(state, compose(*words), words, Path("/imported/tokenizer.json"))
    assert found.config.data.tokenizer == "/imported/tokenizer.json" and found.config.data.end_of_document == "<end>"
    typed = [*words, "data.tokenizer=mine.json"]
    assert import_config(state, compose(*typed), typed, Path("/imported/tokenizer.json")).config.data.tokenizer == "mine.json"
    synthetic = ["recipe=llama_1b"]
    assert "tokenizer" not in import_config(state, compose(*synthetic), synthetic, Path("/imported/t.json")).config.data


def test_the_end_of_a_document_may_be_known_by_its_id(tmp_path: Path) -> None:
    """A mean of steps, or an upcycled one, has it from a run; the text "0" is another token than the one with id 0."""
    Tokenizer.train(["a 0 b"], 300).save(tmp_path / "tokenizer.json")
    end = Tokenizer.load(tmp_path / "tokenizer.json").end_of_document
    words = ["recipe=quickstart", "data=jsonl", "data.input=a.jsonl"]
    found = import_config({"end_of_document": end}, compose(*words), words, tmp_path / "tokenizer.json")
    assert end == 0 and found.config.data.end_of_document == "<|endoftext|>"
    with pytest.raises(ConfigError, match=r"data\.tokenizer.*999"):
        import_config({"end_of_document": 999}, compose(*words), words, tmp_path / "tokenizer.json")
