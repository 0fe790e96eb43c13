"""Tokenizers: any text survives the round trip, training repeats itself, ends of documents can't be forged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Encoding, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from meshloom.data.tokenizing import tokenizer as subject
from meshloom.data.tokenizing.long_documents import encode_long
from meshloom.data.tokenizing.tokenizer import END_OF_DOCUMENT, Tokenizer, byte_alphabet

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


@pytest.mark.parametrize("text", ["", "def main(argv):\n", f"Füße, 数, 🙂 the cat {END_OF_DOCUMENT}"])
def test_the_bytes_of_its_tokens_are_those_of_the_text(text: str):
    for tokenizer in (TRAINED, BYTES):
        (tokens,) = tokenizer.encode_documents([text])
        assert tokenizer.byte_lengths()[tokens].sum() == len(text.encode())


def test_the_bytes_of_sentence_piece_s_tokens():
    """Its word boundary is a space, and a byte without a token of its own is one byte."""
    vocabulary = {"<unk>": 0, "</s>": 1, "▁the": 2, "▁": 3, "ü": 4, "<0xE6>": 5}
    engine = Engine(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    engine.add_special_tokens(["</s>"])
    assert Tokenizer(engine).byte_lengths().tolist() == [5, 0, 4, 1, 2, 1]


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


def metaspace(scheme: str) -> Engine:
    engine = Engine(models.BPE(unk_token="?"))
    setattr(engine, "pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme=scheme))  # noqa: B010
    engine.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=["?", "</s>"], show_progress=False))
    return engine


def llama_2() -> Engine:
    """The marks come from a normalizer, and a whole text is one word, as in Llama 2's tokenizer.json."""
    engine = metaspace("never")
    setattr(engine, "pre_tokenizer", pre_tokenizers.Split("\ufffc", "isolated"))  # noqa: B010
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    setattr(engine, "normalizer", normalizers.Sequence(marks))  # noqa: B010
    return engine


def unigram() -> Engine:
    engine = Engine(models.Unigram())
    setattr(engine, "pre_tokenizer", pre_tokenizers.Metaspace())  # noqa: B010
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["?", "</s>"], unk_token="?", show_progress=False)
    engine.train_from_iterator(CORPUS, trainer)
    return engine


TOKENIZERS = {
    "bytes": lambda: BYTES,
    "byte-level BPE": lambda: TRAINED,
    "Metaspace": lambda: Tokenizer(metaspace("always")),
    "Metaspace, first": lambda: Tokenizer(metaspace("first")),
    "Llama 2": lambda: Tokenizer(llama_2()),
    "Unigram": lambda: Tokenizer(unigram()),
}
LONG = {
    "lines": "".join(f"the cat sat on line {number}\n\n    return the dog  " for number in range(60)),
    "one word": "x" * 900,
    "many scripts": "Füße, 数数数 🙂🙂 the mat, " * 60,
    "white space": ("\n\n" + " " * 7) * 130,
}


@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_documents_get_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch, name: str, text: str):
    """The oracle is the library's own encoding of the whole text."""
    tokenizer = TOKENIZERS[name]()
    whole = tokenizer.encode(LONG[text])
    monkeypatch.setattr(subject, "_PIECE", 300)
    documents = tokenizer.encode_documents([LONG[text], "the end", LONG[text][:300]])
    assert documents[0].tolist() == [*whole, tokenizer.end_of_document]
    assert documents[1].tolist() == [*tokenizer.encode("the end"), tokenizer.end_of_document]
    assert documents[2].tolist() == [*tokenizer.encode(LONG[text][:300]), tokenizer.end_of_document]


def test_a_long_document_is_encoded_in_parts(monkeypatch: pytest.MonkeyPatch):
    """Else the test above would hold of any code that encodes all at once."""
    lengths: list[int] = []

    def encode(part: str) -> Encoding:
        lengths.append(len(part))
        return BYTES._engine.encode(part)

    encode_long(LONG["lines"], 300, encode)
    assert max(lengths) == 300 and len(lengths) > 5


def test_version_1_cuts_long_documents_behind_a_line(monkeypatch: pytest.MonkeyPatch):
    """As runs have begun: each piece gets a mark of its own, and nothing else is lost or added."""
    text = "".join(f"line {number}\n" for number in range(40)) + "x" * 200
    tokenizer = Tokenizer(metaspace("always"))
    monkeypatch.setattr(subject, "_PIECE", 50)
    cut = BYTES.encode_documents([text, "end"], in_pieces=True)
    assert [tokens.tolist() for tokens in cut] == [[*text.encode(), 256], [*b"end", 256]]
    marks = len(tokenizer.encode_documents(["a" * 120], in_pieces=True)[0]) - len(tokenizer.encode_documents(["a" * 120])[0])
    assert marks == 2


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


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.tokenizer: .*gone.* not found; give bpe, bytes"):
        Tokenizer.load(tmp_path / "gone")
    (tmp_path / "bad.json").write_text("{]")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")
