"""Token shards: what is written is read back, appears whole or not at all, and damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.data.shards.manifest import ShardError
from meshloom.data.shards.reader import TokenShards
from meshloom.data.shards.writer import ShardWriter

DOCUMENTS = [np.arange(1, length) % 300 for length in (5, 2, 9, 30, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def tokenizer(path: Path) -> None:
        path.write_text("{}")

    with ShardWriter(tmp_path / "corpus", 300, 0, tokenizer, shard_tokens=12) as writer:
        for document in DOCUMENTS:
            writer.add(document)
    return tmp_path / "corpus"


def test_round_trip(folder: Path):
    shards = TokenShards(folder, verify=True)
    stream = np.concatenate(DOCUMENTS)
    assert len(shards.manifest.shards) == 3
    assert (shards.tokens, shards.documents) == (len(stream), len(DOCUMENTS))
    assert shards.document_lengths().tolist() == [len(document) for document in DOCUMENTS]
    assert shards.tokenizer_file is not None and shards.tokenizer_file.read_text() == "{}"
    ends = np.cumsum([len(document) for document in DOCUMENTS])
    for start in range(len(stream)):
        for stop in range(start + 1, len(stream) + 1):
            assert np.array_equal(shards.read(start, stop), stream[start:stop])
            assert shards.ends_within(start, stop).tolist() == [end for end in ends.tolist() if start < end <= stop]
    with pytest.raises(IndexError):
        shards.read(0, len(stream) + 1)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 70_000), min_size=1, max_size=20), min_size=1, max_size=20), st.integers(1, 60))
def test_round_trip_of_any_documents(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int):
    folder = tmp_path_factory.mktemp("any") / "corpus"
    with ShardWriter(folder, 70_001, shard_tokens=shard_tokens) as writer:
        for document in documents:
            writer.add(np.array(document))
    shards = TokenShards(folder)
    assert shards.read(0, shards.tokens).tolist() == [token for document in documents for token in document]
    lengths = np.array([len(document) for document in documents])
    starts = np.cumsum(lengths) - lengths
    order = np.arange(len(documents))[::-1]
    expected = [token for document in reversed(documents) for token in document]
    assert shards.read_pieces(starts[order], lengths[order]).tolist() == expected


@pytest.mark.parametrize(("vocabulary", "width"), [(65_536, 2), (65_537, 4)])
def test_the_smallest_dtype_that_fits(tmp_path: Path, vocabulary: int, width: int):
    with ShardWriter(tmp_path / "corpus", vocabulary) as writer:
        writer.add(np.array([vocabulary - 1]))
    assert (tmp_path / "corpus/tokens-00000.bin").stat().st_size == width
    assert TokenShards(tmp_path / "corpus").read(0, 1).tolist() == [vocabulary - 1]


def test_the_format_is_what_the_documentation_says(folder: Path):
    """Read by hand, without our reader: digests, widths, ends."""
    stated = json.loads((folder / "dataset.json").read_text())
    shard = stated["shards"][1]
    raw = (folder / shard["tokens"]["name"]).read_bytes()
    assert xxhash.xxh3_128_hexdigest(raw) == shard["tokens"]["xxh3"]
    assert np.frombuffer(raw, "<u2").tolist() == DOCUMENTS[3].tolist()
    assert np.frombuffer((folder / shard["documents"]["name"]).read_bytes(), "<u8").tolist() == [29]


def test_fingerprint_is_that_of_the_contents(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "copy")
    assert TokenShards(tmp_path / "copy").fingerprint == TokenShards(folder).fingerprint
    with ShardWriter(tmp_path / "other", 300, 0) as writer:
        writer.add(DOCUMENTS[0])
    assert TokenShards(tmp_path / "other").fingerprint != TokenShards(folder).fingerprint


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents-00002.bin", "tokenizer.json"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "longer"])
def test_a_missing_or_cut_file_is_named_at_once(folder: Path, name: str, fault: str):
    path = folder / name
    content = path.read_bytes()
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if fault == "truncated" else content + b"\0")
    with pytest.raises(ShardError, match=name):
        TokenShards(folder)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents-00000.bin", "tokenizer.json"])
def test_a_flipped_bit_is_named_on_verification(folder: Path, name: str):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=name):
        TokenShards(folder, verify=True)


def test_every_flipped_bit_of_the_manifest_is_noticed(folder: Path):
    path = folder / "dataset.json"
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 2
        if damaged[place : place + 1].isspace() and content[place : place + 1].isspace():
            continue  # one kind of white space for another: the same manifest
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"dataset\.json"):
            TokenShards(folder)


def test_a_missing_manifest_and_another_version_are_named(folder: Path):
    path = folder / "dataset.json"
    stated = json.loads(path.read_text())
    path.write_text(json.dumps({**stated, "version": 99}))
    with pytest.raises(ShardError, match=r"version 99.*reads meshloom-tokens version 1"):
        TokenShards(folder)
    path.unlink()
    with pytest.raises(ShardError, match=r"dataset\.json: not found.*meshloom data tokenize"):
        TokenShards(folder)


def test_a_token_outside_the_vocabulary_is_named_when_read(folder: Path):
    path = folder / "tokens-00001.bin"
    content = bytearray(path.read_bytes())
    content[2:4] = (300).to_bytes(2, "little")
    path.write_bytes(content)
    shards = TokenShards(folder)
    start = int(shards.manifest.shards[0].token_count)
    assert len(shards.read(0, start + 1))
    with pytest.raises(ShardError, match=r"tokens-00001\.bin: token id 300 is outside the vocabulary of 300"):
        shards.read(start, start + 2)
    with pytest.raises(ShardError, match=r"tokens-00001\.bin"):
        shards.read_pieces(np.array([start, 0]), np.array([3, 2]))


@pytest.mark.parametrize("token", [300, -1])
def test_writer_refuses_a_token_outside_the_vocabulary(tmp_path: Path, token: int):
    with pytest.raises(ValueError, match=f"token id {token}"), ShardWriter(tmp_path / "corpus", 300) as writer:
        writer.add(np.array([1, 2]))
        writer.add(np.array([1, token]))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="corpus is empty"), ShardWriter(tmp_path / "corpus", 300) as writer:
        writer.add(np.array([], np.int64))
    assert list(tmp_path.iterdir()) == []


def test_nothing_shows_before_everything_is_there(tmp_path: Path):
    with ShardWriter(tmp_path / "corpus", 300, shard_tokens=2) as writer:
        writer.add(np.array([1, 2, 3]))
        assert not (tmp_path / "corpus").exists()
    assert (tmp_path / "corpus").is_dir() and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileExistsError):
        ShardWriter(tmp_path / "corpus", 300)


def test_a_tokenizer_that_can_not_be_saved_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(OSError, match="No space"):
        ShardWriter(tmp_path / "shards", 300, save_tokenizer=fail)
    assert not list(tmp_path.iterdir())


def test_a_name_that_leads_out_is_told_with_its_folder(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shards", 300) as writer:
        writer.add(np.arange(9))
    path = tmp_path / "shards/dataset.json"
    path.write_text(path.read_text().replace("tokens-00000.bin", "../tokens-00000.bin"))
    with pytest.raises(ShardError, match=rf"^{path}: .*outside its folder"):
        TokenShards(tmp_path / "shards")
