"""Data nodes end to end: from documents of every kind to samples, built once, held out by document."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import xxhash
from scipy import stats

from meshloom.config.hashing import hash64
from meshloom.config.nodes import build
from meshloom.config.problems import ConfigError
from meshloom.data import nodes
from meshloom.data.batch import IGNORED
from meshloom.data.build import build_node
from meshloom.data.config import CorpusConfig, DataMixtureConfig, JsonlConfig, PackingConfig, SyntheticConfig, TextConfig
from meshloom.data.corpus import Corpus, Packed
from meshloom.data.documents.records import JsonLines
from meshloom.data.documents.sources import TextFiles
from meshloom.data.mixture import Mixture
from meshloom.data.shards.manifest import ShardError
from meshloom.data.summary import data_notices, data_warnings, source_sizes
from meshloom.data.synthetic import Synthetic
from meshloom.data.tokenizing import prepare
from meshloom.data.tokenizing.tokenizer import Tokenizer
from meshloom.trainer.schema import make_composer
from meshloom.trainer.typed import typed_config, typed_node
from support.ranks import run_ranks

TEXTS = [f"document {number} says {' '.join(['word', 'other'][number % 2] * 3)} {number * number}." for number in range(200)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESHLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def jsonl_node(input: str, tokenizer: str, seed: int = 1, **keys: Any) -> nodes.Jsonl:
    values: dict[str, Any] = {"vocabulary": 300, "seq_len": 32, "validation": 0.1, **keys}
    return nodes.Jsonl(JsonlConfig(input=input, tokenizer=tokenizer, **values), seed)


def stream(node: Packed, part: str) -> list[str]:
    """Decode the documents of the shards that a node built."""
    stored = node._train if part == "train" else node._validation
    shards = stored._shards  # type: ignore[union-attr]
    tokens, ends = shards.read(0, shards.tokens), np.cumsum(shards.document_lengths())
    assert node.tokenizer is not None
    return [node.tokenizer.decode(document) for document in np.split(tokens, ends[:-1])]


def composed(*overrides: str) -> Any:
    """Build the node as the trainer does; a vocabulary that is not set stays open."""
    composition = make_composer().compose(list(overrides))
    assert composition.problems == []
    config, problems = typed_config(composition.config)
    assert problems == []
    return build(config.data, seed=config.seed)


def make_text(folder: Path) -> list[str]:
    (folder / "text").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"text/{number:03d}.txt").write_text(text)
    return ["data=text", f"data.input={folder}/text"]


def make_jsonl(folder: Path) -> list[str]:
    (folder / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return ["data=jsonl", f"data.input={folder}/a.jsonl", "data.field=body"]


def make_parquet(folder: Path) -> list[str]:
    pyarrow.parquet.write_table(pa.table({"text": TEXTS}), folder / "a.parquet")
    return ["data=parquet", f"data.input=[{folder}/a.parquet]"]


@pytest.mark.parametrize("make", [make_text, make_jsonl, make_parquet])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_kind_gives_the_same_samples(tmp_path: Path, make: Callable[[Path], list[str]], tokenizer: str):
    keys = [f"data.tokenizer={tokenizer}", "data.vocabulary=300", "data.seq_len=32", "data.validation=0.1"]
    node = composed(*make(tmp_path), *keys)
    assert node.problems() == []
    node.prepare()
    assert node.vocabulary == (257 if tokenizer == "bytes" else 300)
    train, held = stream(node, "train"), stream(node, "validation")
    assert sorted(train + held) == sorted(TEXTS) and 5 <= len(held) <= 40
    samples, validation = node.train(), node.validation()
    epoch = [samples[index].tokens.tolist() for index in range(samples.epoch_size)]
    assert sorted(epoch) == sorted(node.stored[index].tokens.tolist() for index in range(samples.epoch_size))
    assert all(len(validation[index].tokens) == 32 for index in range(len(validation)))
    reference = tmp_path / "reference.jsonl"
    reference.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    other = jsonl_node(str(reference), tokenizer)
    other.prepare()
    assert [other.train()[index].tokens.tolist() for index in range(9)] == epoch[:9]


def test_stdlib_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """On a library of two modules, for speed; the sources' test reads the real one."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "library"))
    (tmp_path / "library").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / f"library/{name}.py").write_text(f"def {name}():\n    return '{name}'\n" * 100)
    node = composed("data=stdlib", "data.seq_len=16", "data.vocabulary=280")
    assert node.problems() == []
    node.prepare()
    assert len(stream(node, "train")) == 3 and len(stream(node, "validation")) == 1  # the end of one of them
    assert len(node.validation()) > 0


def test_seeds_change_the_order_and_nothing_else(jsonl: str):
    first, same, other = (jsonl_node(jsonl, "bytes", seed) for seed in (1, 1, 2))
    for node in (first, same, other):
        node.prepare()
    orders = [
        [node.train()[index].tokens.tolist() for index in range(node.train().epoch_size)] for node in (first, same, other)
    ]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    assert first.fingerprint == other.fingerprint
    held = [[node.validation()[index].tokens.tolist() for index in range(5)] for node in (first, other)]  # type: ignore[index]
    assert held[0] == held[1]


@pytest.mark.parametrize(
    "change", [{"seq_len": 16}, {"tokenizer": "bpe"}, {"validation": 0.2}, {"document_mask": True}, {"packing": "bestfit"}]
)
def test_the_fingerprint_follows_what_decides_the_samples(jsonl: str, change: dict[str, Any]):
    first, other = jsonl_node(jsonl, "bytes"), jsonl_node(jsonl, **{"tokenizer": "bytes", **change})
    first.prepare()
    other.prepare()
    assert first.fingerprint != other.fingerprint


@pytest.mark.parametrize("packing", ["concat", "bestfit"])
def test_document_masks_reach_the_samples(jsonl: str, packing: str):
    node = jsonl_node(jsonl, "bytes", packing=packing, document_mask=True)
    node.prepare()
    samples = [node.train()[index] for index in range(20)]
    assert all(sample.documents is not None for sample in samples)
    assert any((sample.targets == IGNORED).any() and sample.documents.max() for sample in samples)  # type: ignore[union-attr]


def test_split_ignores_order_and_keeps_copies_together(tmp_path: Path):
    held: list[set[str]] = []
    for number, texts in enumerate((TEXTS, TEXTS[::-1], TEXTS * 2)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        node = jsonl_node(str(path), "bytes")
        node.prepare()
        held.append(set(stream(node, "validation")))
        assert not held[-1] & set(stream(node, "train"))
    assert held[0] == held[1] == held[2]


def test_the_held_out_share_is_the_one_asked_for():
    chosen = sum(prepare.is_held_out(f"document {number}", 0.1) for number in range(5000))
    assert stats.binomtest(chosen, 5000, 0.1).pvalue > 1e-3


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_even_the_smallest_corpus_is_held_out_in_part(tmp_path: Path, count: int, version: int):
    for number in range(count):
        (tmp_path / f"{number}.txt").write_text(f"{number} " * 200)
    config = TextConfig(input=f"{tmp_path}/*.txt", tokenizer="bytes", seq_len=4, validation=0.05, version=version)
    node = nodes.Text(config, 1)
    node.prepare()
    train, held = "".join(stream(node, "train")), "".join(stream(node, "validation"))
    assert sorted(train + held) == sorted("".join(f"{number} " * 200 for number in range(count)))
    # Of 401 tokens a document 5 % are 20; the last one is the end of the document. Version 1 held out the first document.
    assert len(held) == (400 if version == 1 and count > 1 else 20 * count - 1)


def test_the_share_is_held_out_of_few_and_unequal_documents(tmp_path: Path):
    """Three books, of which one is a third of the text: the fault was that it was held out whole at 1 %."""
    words = [f"{hash64(number) % 9973} " for number in range(60_000)]
    books = ["".join(words[:20_000]), "".join(words[20_000:21_000]), "".join(words[21_000:])]
    books[0] = next(book for number in range(2000) if prepare.is_held_out(book := f"{number} {books[0]}", 0.01))
    for number, book in enumerate(books):
        (tmp_path / f"{number}.txt").write_text(book)
    node = nodes.Text(TextConfig(input=f"{tmp_path}/*.txt", tokenizer="bytes", seq_len=64), 1)
    node.prepare()
    train, held = stream(node, "train"), stream(node, "validation")
    share = sum(map(len, held)) / sum(map(len, books))
    assert share == pytest.approx(0.01, rel=0.01) and all(any(text in book for text in train) for book in books)
    assert sum(any(text in book for text in held) for book in books) >= 2, "of more than one book"
    assert sum(map(len, train)) + sum(map(len, held)) == sum(map(len, books))
    longest = max(len(text) for text in held)
    assert all(sum(text in book for book in [*train, *held]) == 1 for text in held) and longest > 500


def test_copies_of_a_passage_are_held_out_of_all_of_them(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "".join(f"{number} " for number in range(900))}) + "\n")
    (tmp_path / "b.jsonl").write_text((tmp_path / "a.jsonl").read_text() * 3)
    node = jsonl_node(f"{tmp_path}/*.jsonl", "bytes", validation=0.1)
    node.prepare()
    train, held = stream(node, "train"), stream(node, "validation")
    assert len(held) == 4 and len({*held}) == 1 and not any(held[0] in text for text in train)


def test_validation_data_shorter_than_a_sample_are_padded(tmp_path: Path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 50)
    keys: dict[str, Any] = {"input": f"{tmp_path}/a.txt", "tokenizer": "bytes", "seq_len": 64, "validation": 0.02}
    for mask in (False, True):
        node = nodes.Text(TextConfig(document_mask=mask, **keys), 1)
        node.prepare()
        held = node.validation()
        assert held is not None and len(held) == 1  # 8 of 401 tokens: seven letters and the end
        sample = held[0]
        assert sample.tokens.tolist() == [*b"bcdefgh", *[256] * 57]
        assert sample.targets.tolist() == [*b"cdefgh", 256, *[IGNORED] * 57]
        assert mask == (sample.documents is not None and sample.documents.tolist() == [*[0] * 8, *[1] * 56])


def test_nothing_is_held_out_on_request(jsonl: str):
    node = jsonl_node(jsonl, "bytes", validation=0)
    node.prepare()
    assert node.validation() is None and sorted(stream(node, "train")) == sorted(TEXTS)


def test_all_problems_at_once_and_nothing_touched(cache: Path):
    node = composed(
        "data=text",
        "data.input=nowhere/*.txt",
        "data.seq_len=0",
        "data.packing=tight",
        "data.vocabulary=100",
        "data.validation=1.5",
    )
    keys = {problem.key for problem in node.problems()}
    assert keys == {"data.input", "data.seq_len", "data.packing", "data.vocabulary", "data.validation"}
    assert all(problem.fix for problem in node.problems())
    assert [problem.key for problem in composed("data=text", "data.tokenizer=gone.json").problems()] == [
        "data.input",
        "data.tokenizer",
    ]
    assert not cache.exists()


def test_every_option_composes_and_reports_what_it_lacks():
    for name, key in {"jsonl": "data.input", "parquet": "data.input", "shards": "data.path", "mixture": "data.sources"}.items():
        assert [problem.key for problem in composed(f"data={name}").problems()] == [key]
    assert "data.path" in [problem.key for problem in composed("data=hf").problems()]
    assert composed("data=stdlib").problems() == []
    assert [problem.key for problem in composed("data=synthetic").problems()] == ["data.vocabulary"]


def test_an_empty_and_a_too_small_corpus(tmp_path: Path, cache: Path):
    (tmp_path / "a.txt").write_text("")
    for tokenizer in ("bytes", "bpe"):
        with pytest.raises(ValueError, match=r"corpus 'text'.*(is empty|no document)"):
            nodes.Text(TextConfig(input=f"{tmp_path}/a.txt", tokenizer=tokenizer, seq_len=4), 1).prepare()
    assert not list(cache.glob("corpora/text*"))
    (tmp_path / "a.txt").write_text("some words")
    with pytest.raises(ConfigError, match=r"data\.seq_len: .*has 10 tokens, too few.*use at most 9"):
        nodes.Text(TextConfig(input=f"{tmp_path}/a.txt", tokenizer="bytes", seq_len=100), 1).prepare()
    (tmp_path / "a.txt").write_text("x")  # one token to train on, and one that is held out
    for packing in ("concat", "bestfit"):
        with pytest.raises(ConfigError, match="a sample takes two tokens or more; give it more data") as caught:
            nodes.Text(TextConfig(input=f"{tmp_path}/a.txt", tokenizer="bytes", seq_len=4, packing=packing), 1).prepare()
        assert "use at most" not in str(caught.value)


@pytest.mark.parametrize(("tokens", "said"), [(0, "0 tokens, and"), (1, "1 token, and"), (2, "2 tokens, too few")])
def test_a_want_of_tokens_is_told(tokens: int, said: str):
    shards = SimpleNamespace(folder="corpus", tokens=tokens)
    with pytest.raises(ConfigError, match=f"corpus has {said}"):
        Packed(PackingConfig(seq_len=4), 1)._pack(shards, "data")  # type: ignore[arg-type]


def test_a_corpus_that_is_held_out_whole_says_so(tmp_path: Path, cache: Path):
    (tmp_path / "a.txt").write_text("one two three")
    with pytest.raises(ValueError, match=r"all 3 documents.*held out.*data\.validation"):
        nodes.Text(
            TextConfig(input=f"{tmp_path}/a.txt", separator=" ", tokenizer="bytes", validation=0.999999, version=1), 1
        ).prepare()


def test_damage_in_the_cache_is_named(jsonl: str, cache: Path):
    jsonl_node(jsonl, "bytes").prepare()
    (path,) = cache.glob("corpora/*/train/tokens-00000.bin")
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    jsonl_node(jsonl, "bytes").prepare()
    with pytest.raises(ShardError, match=r"train/tokens-00000\.bin"):
        jsonl_node(jsonl, "bytes", verify=True).prepare()
    path.write_bytes(content[:-1])
    with pytest.raises(ShardError, match=r"train/tokens-00000\.bin"):
        jsonl_node(jsonl, "bytes").prepare()


def test_one_process_builds_while_the_others_wait(jsonl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built = prepare.write_corpus
    trained = Tokenizer.train

    def slowly(*arguments: Any, **options: Any) -> None:
        with (tmp_path / "log").open("a") as log:
            log.write("corpus\n")
        time.sleep(0.3)
        built(*arguments, **options)

    def logged(*arguments: Any, **keys: Any) -> Tokenizer:
        with (tmp_path / "log").open("a") as log:
            log.write("tokenizer\n")
        return trained(*arguments, **keys)

    monkeypatch.setattr(prepare, "write_corpus", slowly)
    monkeypatch.setattr(Tokenizer, "train", logged)

    def body(rank: int, world_size: int) -> tuple[str, list[int]]:
        node = jsonl_node(jsonl, "bpe")
        node.prepare()
        return node.fingerprint, node.train()[rank].tokens.tolist()

    results = run_ranks(4, body)
    assert len({fingerprint for fingerprint, _ in results}) == 1
    assert sorted((tmp_path / "log").read_text().split()) == ["corpus", "tokenizer"]
    alone = body(2, 1)
    assert alone == results[2]
    assert len((tmp_path / "log").read_text().split()) == 2


def test_tokenizer_sample_is_bounded_uniform_and_orderless():
    texts = [f"{number:04d}" * 5 for number in range(1000)]
    sample = prepare.uniform_sample(texts, 2000)
    assert len(sample) == 100 and sample == prepare.uniform_sample(reversed(texts), 2000)
    numbers = [int(text[:4]) for text in sample]
    assert stats.kstest(numbers, stats.uniform(0, 1000).cdf).pvalue > 1e-3
    assert prepare.uniform_sample(["x" * 50], 10) == ["x" * 50]


@pytest.mark.parametrize("version", [2, 3])
def test_the_tokenizer_is_trained_on_none_that_is_held_out(tmp_path: Path, version: int):
    """The fault: both choices took the lowest hashes, so a sample of 1 % was the validation set."""
    texts = [f"text {number:06d}" for number in range(20_000)]
    (tmp_path / "all.txt").write_text("|".join(texts))
    source = TextFiles(str(tmp_path / "all.txt"), "|")
    sample = prepare.training_sample(source, sum(map(len, texts)) // 20, 0.01, version)
    held = {text for text in texts if prepare.is_held_out(text, 0.01)}
    assert len(sample) == 1000 and len(held & {*sample}) == (0 if version == 3 else len(held))
    # Of the others the choice is independent: as many as by chance have a hash below the median.
    below = sum(prepare.is_held_out(text, 0.5) for text in sample)
    assert (stats.binomtest(below, 1000, 0.49 / 0.99).pvalue > 1e-3) == (version == 3)


def test_a_source_that_is_held_out_whole_trains_the_tokenizer(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one|two")
    source = TextFiles(str(tmp_path / "a.txt"), "|")
    assert sorted(prepare.training_sample(source, 100, 0.999999, 3)) == ["one", "two"]


def test_older_rules_find_the_tokenizer_they_had(tmp_path: Path, jsonl: str):
    """Runs under version 2 resume on the cache of before: the name is the digest of the same inputs."""
    source = JsonLines(jsonl)
    prepare.train_tokenizer([(source, 0.1)], 270, 10_000, tmp_path, version=2)
    inputs = [1, [source.identity(tmp_path / "identities")], 270, 10_000]
    name = xxhash.xxh3_128_hexdigest(json.dumps(inputs).encode())
    assert (tmp_path / "tokenizers" / f"bpe-270-{name[:16]}").is_dir()
    prepare.train_tokenizer([(source, 0.1)], 270, 10_000, tmp_path)
    prepare.train_tokenizer([(source, 0.2)], 270, 10_000, tmp_path)
    assert len([path for path in (tmp_path / "tokenizers").iterdir() if path.is_dir()]) == 3


class UserCorpus(Corpus):
    """A user's own node: called with the keys of its node and `seed`."""

    def __init__(self, seed: int, file: str, tokenizer: str, seq_len: int, validation: float) -> None:
        config = CorpusConfig(tokenizer=tokenizer, seq_len=seq_len, validation=validation)
        super().__init__(config, seed, JsonLines(file))


def test_a_users_class_is_called_with_keys_and_seed(jsonl: str):
    keys = {"tokenizer": "bytes", "seq_len": 32, "validation": 0.1}
    node = {"_target_": f"{__name__}.UserCorpus", "name": "mine", "file": jsonl, **keys}
    mixture = DataMixtureConfig(seq_len=32, tokenizer="bytes", sources={"mine": node}, weights={"mine": 1})
    mixed = build_node(mixture, 1, None)
    alone, reference = build_node(typed_node("data", node), 1, None), jsonl_node(jsonl, "bytes")
    for made in (mixed, alone, reference):
        assert made.problems() == []
        made.prepare()
    assert isinstance(alone, UserCorpus) and isinstance(mixed, Mixture) and isinstance(mixed.nodes["mine"], UserCorpus)
    assert alone.fingerprint == mixed.nodes["mine"].fingerprint == reference.fingerprint
    assert all(np.array_equal(alone.train()[index].tokens, reference.train()[index].tokens) for index in range(9))


class UserNoise:
    """A user's own node of a vocabulary that its keys may leave open."""

    def __init__(self, seed: int, vocabulary: int) -> None:
        self.vocabulary = vocabulary


@pytest.mark.parametrize(("model", "expected"), [(77, 77), (None, 32_000)])
def test_an_open_vocabulary_is_the_models(model: int | None, expected: int):
    user = typed_node("data", {"_target_": f"{__name__}.UserNoise", "name": "noise", "vocabulary": None})
    assert build_node(user, 1, model).vocabulary == build_node(SyntheticConfig(), 1, model).vocabulary == expected
    assert build_node(SyntheticConfig(vocabulary=99), 1, model).vocabulary == 99


def synthetic(seed: int, vocabulary: int = 50) -> Synthetic:
    return Synthetic(SyntheticConfig(seq_len=1000, vocabulary=vocabulary), seed)


def test_synthetic_is_uniform_seeded_and_endless():
    node = synthetic(3)
    node.prepare()
    samples, validation = node.train(), node.validation()
    assert validation is not None and len(validation) == 64 and node.tokenizer is None
    tokens = np.concatenate([samples[index].tokens for index in range(50)])
    assert tokens.min() == 0 and tokens.max() == 49
    assert stats.chisquare(np.bincount(tokens, minlength=50)).pvalue > 1e-4
    assert np.array_equal(samples[10**15].tokens, synthetic(3).train()[10**15].tokens)
    assert not np.array_equal(samples[0].tokens, synthetic(4).train()[0].tokens)
    assert not np.array_equal(samples[0].tokens, samples[1].tokens)
    assert np.array_equal(samples[0].tokens[1:], samples[0].targets[:-1])
    with pytest.raises(IndexError):
        validation[64]
    assert node.fingerprint != synthetic(3, vocabulary=51).fingerprint


def test_the_size_of_every_source_is_said(jsonl: str, tmp_path: Path):
    (tmp_path / "b.jsonl").write_text('{"text": "abcd"}\n' * 400)
    keys = {"_target_": "meshloom.data.nodes.Jsonl", "validation": 0.1}
    sources = {"a": {**keys, "input": jsonl}, "b.c": {**keys, "input": f"{tmp_path}/b.jsonl"}}
    node = Mixture(DataMixtureConfig(seq_len=16, tokenizer="bytes", sources=sources, weights={"a": 1, "b.c": 3}), 1)
    assert node.problems() == []
    node.prepare()
    one, other = source_sizes(node)
    assert (one.name, one.weight, other.name, other.weight) == ("a", 0.25, "b.c", 0.75)
    assert one.tokens + one.held_tokens == sum(len(text) + 1 for text in TEXTS) and one.asked == 0.1
    assert one.documents + one.held_documents == 200 and one.samples == (one.tokens - 1) // 16
    # 400 copies of one text: the same passage of each, one token of five.
    assert (other.tokens, other.held_tokens) == (1600, 400)
    assert data_notices(node)[1] == "data b.c: 1,600 tokens train, and 400 (20.00%) are held out"
    assert one.padding == other.padding == 0.0
    sources["b.c"] |= {"packing": "bestfit", "validation": 0.0}  # three documents of five tokens in sixteen positions
    packed = Mixture(DataMixtureConfig(seq_len=16, tokenizer="bytes", sources=sources, weights={"a": 1, "b.c": 3}), 1)
    packed.prepare()
    assert [each.padding for each in source_sizes(packed)][1] == pytest.approx(1 - 2000 / (16 * 134))
    assert data_notices(packed)[1].endswith("; 6.7% of its positions are padding")
    assert data_warnings(node) == []


def test_a_share_far_from_the_one_asked_for_is_a_warning(tmp_path: Path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"{number} " * 200)
    said: list[list[str]] = []
    for version in (1, 2):
        config = TextConfig(input=f"{tmp_path}/*.txt", tokenizer="bytes", seq_len=4, validation=0.01, version=version)
        node = nodes.Text(config, 1)
        node.prepare()
        said.append(data_warnings(node))
    assert said[1] == [] and len(said[0]) == 1
    assert said[0][0].startswith("data.validation: 1.00% of the tokens were to be held out, and 33.33% are; ")
