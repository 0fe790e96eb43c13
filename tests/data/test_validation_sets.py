"""Named validation sets: read whole, cut as the training data are, and refused by key."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from meshloom.config.problems import ConfigError
from meshloom.data.build import build_node
from meshloom.data.config import SyntheticConfig, TextConfig
from meshloom.data.documents import identity
from meshloom.data.validation_sets import ValidationSets
from meshloom.trainer.run import prepared_data

TEXT = "meshloom.data.nodes.Text"


def training(folder: Path, **keys: Any) -> TextConfig:
    (folder / "train.txt").write_text("the quick brown fox " * 20)
    return TextConfig(input=f"{folder}/train.txt", tokenizer="bytes", seq_len=8, cache_dir=str(folder / "cache"), **keys)


def sets(config: Any, **nodes: Any) -> ValidationSets:
    return ValidationSets(nodes, config, 1)


def test_a_set_is_read_whole_in_the_tokens_of_the_training_data(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("abcdefghijklmnop")
    config = training(tmp_path)
    data = build_node(config, 1, None)
    data.prepare()
    # A share to hold out, another tokenizer and another length say nothing here.
    node = {"_target_": TEXT, "input": f"{tmp_path}/wiki.txt", "validation": 0.5, "tokenizer": "bpe", "seq_len": 4}
    (part,) = sets(config, wiki=node).parts(data)
    assert (part.name, part.weight, len(part.samples)) == ("wiki", 0.0, 2)
    assert data.tokenizer is not None
    assert sorted(data.tokenizer.decode(part.samples[k].tokens) for k in range(2)) == ["abcdefgh", "ijklmnop"]


def test_a_value_that_is_no_set_is_refused_by_key(tmp_path: Path) -> None:
    config = training(tmp_path)
    wrong = {
        "gone": {"_target_": TEXT, "input": f"{tmp_path}/gone.txt"},
        "typo": {"_target_": TEXT, "inptu": "x"},
        "flat": "wiki.txt",
        "mixed": {"_target_": "meshloom.data.mixture.Mixture", "sources": {}, "weights": {}},
    }
    found = {problem.key for problem in sets(config, **wrong).problems()}
    assert {"validation.gone.input", "validation.typo.inptu", "validation.flat", "validation.mixed"} == found


def test_text_beside_data_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("abc")
    config = SyntheticConfig(seq_len=8, vocabulary=61)
    data = build_node(config, 1, None)
    data.prepare()
    with pytest.raises(ConfigError, match=r"validation\.wiki: the training data have no tokenizer"):
        sets(config, wiki={"_target_": TEXT, "input": f"{tmp_path}/wiki.txt", "cache_dir": str(tmp_path)}).parts(data)


def test_a_disk_that_fails_is_told_with_file_key_and_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a corpus room in the cache is no help; of a set neither key nor fix was told."""
    (tmp_path / "wiki.txt").write_text("abc")
    config, failing = training(tmp_path), {"train.txt", "wiki.txt"}
    node = {"_target_": TEXT, "input": f"{tmp_path}/wiki.txt"}

    def digest(path: Path, *others: Any) -> str:
        if path.name in failing:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return "0" * 32

    monkeypatch.setattr(identity, "digest_file", digest)
    with pytest.raises(ConfigError, match=r"data: \S+/train\.txt: Input/output error; check the disk that it is on"):
        prepared_data(config, 1, None)
    failing.remove("train.txt")
    data = prepared_data(config, 1, None)
    with pytest.raises(ConfigError, match=r"validation\.wiki: \S+/wiki\.txt: Input/output error; check the disk that it is on"):
        sets(config, wiki=node).parts(data)
    failing.clear()
    (tmp_path / "cache").rename(tmp_path / "old")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"data: \S+/cache\S*: .*; make room or get access, or set data\.cache_dir"):
        prepared_data(config, 1, None)
