"""Tokenizers: any text survives the round trip, training repeats itself, ends of documents can't be forged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers

from meshloom.data import tokenizer as subject
from meshloom.data.tokenizer import END_OF_DOCUMENT, Tokenizer, byte_alphabet

CORPUS = ["def main(argv):\n    return 0\n" * 20, "the cat sat on the mat, the dog did not. " * 30, "Füße, 数, 🙂"]
TRAINED = Tokenizer.train(CORPUS, 300)
BYTES = Tokenizer.bytes()


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(text: str):
    for tokenizer in (TRAINED, BYTES):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert all(0 <= token < tokenizer.vocabulary for token in tokens)
    assert BYTES.encode(text) == [*text.encode()]


def test_the_alphabet_is_that_of_byte_level_tokenizers():
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert byte_alphabet()[ord("A")] == "A" and byte_alphabet()[ord(" ")] == "Ġ" and byte_alphabet()[ord("\n")] == "Ċ"


def test_training_learns_and_repeats_itself():
    assert TRAINED.vocabulary == 300
    assert len(TRAINED.encode("the cat sat on the mat")) < 12
    again = Tokenizer.train(reversed(CORPUS), 300)
    assert again.fingerprint == TRAINED.fingerprint
    assert Tokenizer.train(CORPUS, 299).fingerprint != TRAINED.fingerprint


def test_a_small_corpus_gives_a_smaller_vocabulary():
    assert Tokenizer.train(["aab"], 5000).vocabulary < 300


def test_documents_end_with_the_end_of_document_and_nowhere_else():
    texts = ["one", "", f"two {END_OF_DOCUMENT} three"]
    for tokenizer in (TRAINED, BYTES):
        documents = tokenizer.encode_documents(texts)
        for text, tokens in zip(texts, documents, strict=True):
            assert np.flatnonzero(tokens == tokenizer.end_of_document).tolist() == [len(tokens) - 1]
            assert tokens[:-1].tolist() == tokenizer.encode(text)
            assert tokenizer.decode(tokens) == text


def test_long_documents_are_cut_without_losing_a_character(monkeypatch: pytest.MonkeyPatch):
    text = "".join(f"line {number}\n" for number in range(40)) + "x" * 200
    whole = BYTES.encode_documents([text, "end"])
    monkeypatch.setattr(subject, "_PIECE", 50)
    cut = BYTES.encode_documents([text, "end"])
    assert [tokens.tolist() for tokens in cut] == [tokens.tolist() for tokens in whole]


def test_save_and_load(tmp_path: Path):
    TRAINED.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == TRAINED.fingerprint
        assert loaded.encode(CORPUS[0]) == TRAINED.encode(CORPUS[0])


def test_a_disk_that_takes_no_tokenizer_is_an_os_error(tmp_path: Path):
    with pytest.raises(OSError, match="No such file or directory"):
        Tokenizer.bytes().save(tmp_path / "nowhere" / "tokenizer.json")


def test_a_tokenizer_of_any_origin(tmp_path: Path):
    engine = Engine(models.WordLevel({"a": 0, "b": 1, "[END]": 7, "?": 2}, unk_token="?"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.enable_padding(length=64)
    engine.enable_truncation(2)
    engine.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match=r"data\.end_of_document.*no token '<\|endoftext\|>' or "):
        Tokenizer.load(tmp_path / "words.json")
    tokenizer = Tokenizer.load(tmp_path / "words.json", "[END]")
    assert (tokenizer.vocabulary, tokenizer.end_of_document) == (8, 7)
    assert tokenizer.encode_documents(["a b a b c"])[0].tolist() == [0, 1, 0, 1, 2, 7]


def test_what_is_no_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.tokenizer: .*gone.* not found; give bpe, bytes"):
        Tokenizer.load(tmp_path / "gone")
    (tmp_path / "bad.json").write_text("{]")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")
