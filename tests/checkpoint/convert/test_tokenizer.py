"""An import carries its model's tokenizer, whose fingerprint a run's tokenizer is compared with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import models

from meshloom.checkpoint.convert.tokenizer import carry_tokenizer
from meshloom.checkpoint.errors import CheckpointError
from meshloom.data.tokenizing.tokenizer import Tokenizer


def tokenizer(folder: Path, end: str) -> Path:
    engine = Engine(models.WordLevel(vocab={"a": 0, "b": 1}, unk_token="a"))
    engine.add_special_tokens([end])
    engine.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_the_folders_tokenizer_comes_with_its_fingerprint(tmp_path: Path) -> None:
    file = tokenizer(tmp_path, "</s>")
    carried = carry_tokenizer(tmp_path)
    assert carried.files == {"tokenizer.json": file.read_bytes()}
    assert carried.state == {"tokenizer": Tokenizer.load(file).fingerprint, "end_of_document": None}


@pytest.mark.parametrize("end", ["<fin>", {"content": "<fin>"}])
def test_an_unusual_end_is_that_of_the_models_folder(tmp_path: Path, end: object) -> None:
    file = tokenizer(tmp_path, "<fin>")
    assert carry_tokenizer(tmp_path).files == {}, "nobody knows how a document ends"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    assert carry_tokenizer(tmp_path).state == {
        "tokenizer": Tokenizer.load(file, "<fin>").fingerprint,
        "end_of_document": "<fin>",
    }


def test_one_that_is_given_must_be_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert carry_tokenizer(tmp_path).state == {} and "give --tokenizer" in caplog.text
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        carry_tokenizer(tmp_path, tmp_path / "absent.json")
    (tmp_path / "other").mkdir()
    file = tokenizer(tmp_path / "other", "</s>")
    assert carry_tokenizer(tmp_path, file).files["tokenizer.json"] == file.read_bytes()
