"""`meshloom data`: from files to shards that a run reads, with exit codes that can be believed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers

from meshloom.config.problems import ConfigError
from meshloom.data.config import DataMixtureConfig, ShardsConfig
from meshloom.data.mixture import Mixture
from meshloom.data.nodes import Tokenized
from meshloom.data.shards.manifest import ShardError
from meshloom.data.shards.reader import TokenShards
from meshloom.data.tokenizing.tokenizer import Tokenizer
from meshloom.launch.cli import main as meshloom
from meshloom.launch.data import main

TEXTS = [f"document {number} of the corpus" for number in range(100)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHLOOM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    pyarrow.parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    return tmp_path


@pytest.mark.parametrize(
    "keys", [["input=a.jsonl.gz"], ["input=a.parquet"], ["input=a.txt", "separator=\n\n"], ["input=.", "kind=jsonl"]]
)
def test_every_kind_gives_the_same_shards(
    inputs: Path, keys: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(inputs)
    code = meshloom(["data", "tokenize", *keys, "output=out/shards", "vocabulary=280", "validation=0.2", "shard_tokens=300"])
    said = capsys.readouterr().out.splitlines()
    assert code == 0 and len(said) == 2 and "vocabulary 280" in said[0] and " files" in said[0]
    node = Tokenized(ShardsConfig(path="out/shards", seq_len=8), 1)
    assert node.problems() == []
    node.prepare()
    held = node.validation()
    assert node.tokenizer is not None and held is not None and node.vocabulary == 280
    shards = node.stored._shards  # type: ignore[attr-defined]
    assert len(shards.manifest.shards) > 1
    assert "of the corpus" in node.tokenizer.decode(shards.read(0, 60))
    assert main(["verify", "path=out/shards"]) == 0
    assert capsys.readouterr().out.splitlines() == said
    assert main(["verify", "path=out/shards/train"]) == 0
    single = Tokenized(ShardsConfig(path="out/shards/train", validation="out/shards/validation", seq_len=8), 1)
    assert single.problems() == []
    single.prepare()
    assert single.fingerprint == node.fingerprint
    alone = Tokenized(ShardsConfig(path="out/shards/train", seq_len=8), 1)
    alone.prepare()
    assert alone.validation() is None


def test_a_text_too_small_for_the_vocabulary_is_told(inputs: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["tokenize", f"input={inputs / 'a.txt'}", f"output={inputs / 'few'}", "vocabulary=30000"]) == 0
    given = Tokenizer.load(inputs / "few" / "train").vocabulary
    assert 257 <= given < 30000
    assert f"vocabulary: {given:,} tokens in place of 30,000" in capsys.readouterr().err
    for name, words in {"filled": ["vocabulary=280"], "bytes": ["tokenizer=bytes"]}.items():
        assert main(["tokenize", f"input={inputs / 'a.txt'}", f"output={inputs / name}", *words]) == 0
        assert "in place of" not in capsys.readouterr().err


def test_bad_arguments_are_named_together_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "there").mkdir()
    bad = ["input=gone.jsonl", f"output={tmp_path}/there", "vocabulary=3", "validation=1", "shard_tokens=0"]
    assert main(["tokenize", *bad]) == 2
    said = capsys.readouterr().err
    for key in ("input: 'gone.jsonl' matches no file", "output: ", "vocabulary: 3", "validation: 1.0", "shard_tokens: 0"):
        assert f"- {key}" in said
    assert main(["tokenize", "input=a", f"output={tmp_path}/new", "kind=pdf"]) == 2
    assert main(["tokenize", "outputs=x"]) == 2
    assert "kind: 'pdf' is unknown" in (said := capsys.readouterr().err) and "did you mean output?" in said
    assert main([]) == main(["forget"]) == main(["verify", f"path={tmp_path}"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_unreadable_documents_and_damaged_shards_end_with_1(inputs: Path, capsys: pytest.CaptureFixture[str]):
    content = (inputs / "a.jsonl.gz").read_bytes()
    (inputs / "cut.jsonl.gz").write_bytes(content[: len(content) // 2])
    out = inputs / "shards"
    assert main(["tokenize", f"input={inputs}/cut.jsonl.gz", f"output={out}", "tokenizer=bytes"]) == 1
    assert "cut.jsonl.gz: damaged behind line" in capsys.readouterr().err
    assert not out.exists() and not list(inputs.glob(".shards.building-*"))
    assert main(["tokenize", f"input={inputs}/a.jsonl.gz", f"output={out}", "tokenizer=bytes", "validation=0"]) == 0
    path = out / "train/tokens-00000.bin"
    damaged = bytearray(path.read_bytes())
    damaged[10] ^= 1
    path.write_bytes(damaged)
    capsys.readouterr()
    assert main(["verify", f"path={out}"]) == 1
    assert "tokens-00000.bin: damaged" in capsys.readouterr().err


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == main(["tokenize", "--help"]) == 0
    said = capsys.readouterr().out
    assert "output=<text>" in said and "shard_tokens=" in said and "meshloom data verify" in said


@pytest.mark.parametrize("shape", ["{}", "{}/*"])
def test_files_of_a_folder_are_looked_at_and_not_taken_for_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: str
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    given = shape.format(folder)
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert main(["tokenize", f"input={given}", f"output={tmp_path / 'out'}", "tokenizer=bytes", "validation=0"]) == 0
    assert " 8 tokens in 2 documents" in capsys.readouterr().out  # three letters and an end each
    (folder / "b.txt").write_text("three")
    assert main(["tokenize", f"input={given}", f"output={tmp_path / 'other'}", "tokenizer=bytes"]) == 2
    assert "kind: " in (said := capsys.readouterr().err) and "jsonl and text" in said
    words = [f"input={given}", "kind=text", f"output={tmp_path / 'third'}", "tokenizer=bytes"]
    assert main(["tokenize", *words]) == 0


def own_end(tmp_path: Path) -> Path:
    """A tokenizer whose end of a document has a name of its own, beside one of the well-known names."""
    engine = Engine(models.WordLevel({"?": 0, "document": 1, "of": 2, "</s>": 3, "[DONE]": 4}, unk_token="?"))
    setattr(engine, "pre_tokenizer", pre_tokenizers.Whitespace())  # noqa: B010
    engine.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


@pytest.mark.parametrize("end", ["[DONE]", "</s>"])
def test_shards_know_which_token_ends_a_document(inputs: Path, end: str):
    """The fault: data=shards, which has no such key, refused these shards or took another end."""
    words = [f"tokenizer={own_end(inputs)}", f"end_of_document={end}", "validation=0.2"]
    assert main(["tokenize", f"input={inputs}/a.parquet", f"output={inputs}/out", *words]) == 0
    node = Tokenized(ShardsConfig(path=f"{inputs}/out", seq_len=8), 1)
    node.prepare()
    assert node.tokenizer is not None and node.tokenizer.end_of_document == {"[DONE]": 4, "</s>": 3}[end]
    assert node.tokenizer.fingerprint == Tokenizer.load(inputs / "words.json", end).fingerprint


def test_two_ends_of_a_document_do_not_mix(inputs: Path):
    """Neither in a mixture nor between what is trained on and what is held out."""
    for name, end in (("one", "[DONE]"), ("two", "</s>")):
        words = [f"tokenizer={own_end(inputs)}", f"end_of_document={end}", "validation=0"]
        assert main(["tokenize", f"input={inputs}/a.parquet", f"output={inputs}/{name}", *words]) == 0
    paths = {name: f"{inputs}/{name}/train" for name in ("one", "two")}
    target = "meshloom.data.nodes.Tokenized"
    sources = {name: {"_target_": target, "path": path} for name, path in paths.items()}
    mixed = Mixture(DataMixtureConfig(seq_len=8, sources=sources, weights={"one": 1, "two": 1}), 1)
    with pytest.raises(ConfigError, match=r"data\.sources\.two: its tokens come from another tokenizer, or another token ends"):
        mixed.prepare()
    node = Tokenized(ShardsConfig(path=paths["one"], validation=paths["two"], seq_len=8), 1)
    with pytest.raises(ShardError, match=r"two/train: token 3 ends a document, but 4 in .*one/train"):
        node.prepare()


def test_validation_shards_of_another_tokenizer_are_refused(inputs: Path):
    """The same size of vocabulary, and other ids."""
    for name, text in (("one", "abc "), ("two", "xyz ")):
        (inputs / f"{name}.txt").write_text(text * 500)
        words = ["vocabulary=260", "validation=0"]
        assert main(["tokenize", f"input={inputs}/{name}.txt", f"output={inputs}/{name}", *words]) == 0
    node = Tokenized(ShardsConfig(path=f"{inputs}/one/train", validation=f"{inputs}/two/train", seq_len=8), 1)
    with pytest.raises(ShardError, match=r"two/train: its tokens come from another tokenizer than those of .*one/train"):
        node.prepare()


RECORDS = [{"text": text} for text in TEXTS]


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.json", json.dumps(RECORDS).encode(), "jsonl"),
        ("A.JSONL", "".join(json.dumps(record) + "\n" for record in RECORDS).encode(), "jsonl"),
        ("part-0", json.dumps(RECORDS, indent=1).encode(), "jsonl"),
        ("a.bz2", bz2.compress("".join(json.dumps(record) + "\n" for record in RECORDS).encode()), "jsonl"),
        ("a.jsonl.xz", lzma.compress(json.dumps(RECORDS).encode()), "jsonl"),
        ("a.txt.gz", gzip.compress("\n".join(TEXTS).encode()), "text"),
    ],
)
def test_the_kind_is_told_by_the_content(tmp_path: Path, name: str, content: bytes, kind: str):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    words = ["tokenizer=bytes", "validation=0", "separator=\n"]
    assert main(["tokenize", f"input={tmp_path}/in/*", f"output={tmp_path}/out", *words]) == 0
    shards = TokenShards(tmp_path / "out/train")
    assert shards.documents == 100 and shards.tokens == sum(len(text) + 1 for text in TEXTS), kind


def test_markup_as_text_is_said_with_the_kind(inputs: Path, capsys: pytest.CaptureFixture[str]):
    (inputs / "in").mkdir()
    (inputs / "in/a.json").write_text(json.dumps(RECORDS))
    words = ["tokenizer=bytes", "validation=0"]
    assert main(["tokenize", f"input={inputs}/in/a.json", f"output={inputs}/out", "kind=text", *words]) == 0
    assert TokenShards(inputs / "out/train").documents == 1
    assert main(["tokenize", f"input={inputs}/in/a.json", f"output={inputs}/none", "field=body", *words]) == 2
    assert "field: '" in capsys.readouterr().err
