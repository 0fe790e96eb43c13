"""Mixtures: exact shares per block, every source complete in each of its epochs, one tokenizer for all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.config.keys import Side
from meshloom.config.problems import ConfigError
from meshloom.data.build import build_node
from meshloom.data.config import DataMixtureConfig
from meshloom.data.mixture import Mixture
from meshloom.data.nodes import Jsonl
from meshloom.data.samples.blend import Blend, MixedSamples, apportion
from meshloom.data.samples.order import ValidationSamples
from meshloom.data.shards.writer import ShardWriter
from meshloom.data.validation import ValidationPart, samples_of_parts, validation_parts
from meshloom.launch import data as command
from meshloom.trainer.schema import make_composer
from meshloom.trainer.sides import key_sides
from meshloom.trainer.typed import typed_config

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


def test_apportionment_is_that_of_largest_remainders():
    """The example of Wikipedia's article on the largest remainder method: Hare quota, 10 seats."""
    assert apportion([47_000, 16_000, 15_900, 12_000, 6_000, 3_100], 10) == [5, 2, 1, 1, 1, 0]


@given(WEIGHTS, st.integers(1, 2000))
def test_apportionment_is_exact_and_within_one(weights: list[float], places: int):
    counts = apportion(weights, places)
    assert sum(counts) == places
    assert all(abs(count - weight * places / sum(weights)) < 1 + 1e-9 for count, weight in zip(counts, weights, strict=True))


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 2**63), st.integers(1, 4))
def test_every_block_has_the_shares_and_every_source_counts_on(counts: list[int], seed: int, blocks: int):
    blend = Blend(counts, seed)
    size = sum(counts)
    places = [blend(index) for index in range(blocks * size)]
    for block in range(blocks):
        assert Counter(source for source, _ in places[block * size : (block + 1) * size]) == dict(enumerate(counts))
    for source, count in enumerate(counts):
        assert sorted(number for where, number in places if where == source) == list(range(blocks * count))
    assert [blend(index) for index in reversed(range(blocks * size))] == places[::-1]


def test_blocks_differ_in_order_and_are_mixed():
    blend = Blend([500, 500], 1)
    orders = [[blend(block * 1000 + index)[0] for index in range(1000)] for block in range(2)]
    assert orders[0] != orders[1]
    runs = 1 + np.count_nonzero(np.diff(orders[0]))
    assert 430 < runs < 572  # Wald and Wolfowitz: 501 ± 4.5 standard deviations of 15.8


def write(path: Path, word: str, count: int) -> str:
    path.write_text("".join(json.dumps({"text": f"{word} {number} " * 4}) + "\n" for number in range(count)))
    return str(path)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("MESHLOOM_CACHE", str(tmp_path / "cache"))
    return {"few": write(tmp_path / "few.jsonl", "few", 30), "many": write(tmp_path / "many.jsonl", "many", 300)}


def node(path: str, **keys: Any) -> dict[str, Any]:
    return {"_target_": "meshloom.data.nodes.Jsonl", "name": "jsonl", "input": path, "seq_len": 1024, "validation": 0.1, **keys}


def mixture(files: dict[str, str], seed: int = 1, **keys: Any) -> Mixture:
    values: dict[str, Any] = {"seq_len": 8, "tokenizer": "bytes", "weights": {"few": 1, "many": 3}, "block": 20, **keys}
    return Mixture(DataMixtureConfig(sources={name: node(path) for name, path in files.items()}, **values), seed)


def mixed_sources(sources: dict[str, Any], **keys: Any) -> Mixture:
    values: dict[str, Any] = {"weights": dict.fromkeys(sources, 1), **keys}
    return Mixture(DataMixtureConfig(seq_len=8, sources=sources, **values), 1)


def origin(mixed: Mixture, tokens: np.ndarray) -> str:
    assert mixed.tokenizer is not None
    letters = set(mixed.tokenizer.decode(tokens)) & set("fewmany") - set("e")
    return "few" if letters & set("fw") else "many" if letters & set("many") else "?"


def test_samples_come_by_weight_each_exactly_once(files: dict[str, str]):
    mixed = mixture(files)
    assert mixed.problems() == []
    mixed.prepare()
    samples = mixed.train()
    assert isinstance(samples, MixedSamples) and samples.blend.counts == [5, 15]
    origins = Counter(origin(mixed, samples[index].tokens) for index in range(2000))
    assert origins["few"] <= 500 and origins["many"] <= 1500 and origins["?"] < 400
    few = mixed.nodes["few"].train()
    size = few.epoch_size  # type: ignore[attr-defined]
    taken = [samples.blend(index)[1] for index in range(20 * size) if samples.blend(index)[0] == 0]
    assert sorted(taken[:size]) != taken[:size] and sorted(taken) == list(range(5 * size))
    stored = sorted(mixed.nodes["few"].stored[place].tokens.tolist() for place in range(size))  # type: ignore[attr-defined]
    for epoch in range(5):
        numbers = [number for number in taken if number // size == epoch]
        assert sorted(few[number].tokens.tolist() for number in numbers) == stored


def test_a_source_keeps_its_order_when_others_come_and_go(files: dict[str, str]):
    both, one = mixture(files), mixture({"many": files["many"]}, weights={"many": 1})
    both.prepare()
    one.prepare()
    for index in range(20):
        assert np.array_equal(both.nodes["many"].train()[index].tokens, one.nodes["many"].train()[index].tokens)
    assert both.fingerprint != one.fingerprint


def test_sources_are_validated_apart_and_weighted(files: dict[str, str]):
    """The fault: 119 and 2 held-out samples at 0.1 and 0.9 were mixed into 2, none of them of the first source."""
    mixed = mixture(files)
    mixed.prepare()
    parts = validation_parts(mixed)
    assert [(part.name, part.weight) for part in parts] == [("few", 1), ("many", 3)]
    for part in parts:
        own = mixed.nodes[part.name].validation()
        assert isinstance(own, ValidationSamples) and len(part.samples) == len(own)
        assert np.array_equal(part.samples[0].tokens, own[0].tokens)
    other = mixture(files, seed=9)
    other.prepare()
    assert np.array_equal(parts[1].samples[5].tokens, validation_parts(other)[1].samples[5].tokens)


@pytest.mark.parametrize(
    ("sizes", "weights", "asked", "expected"),
    [([119, 2], [0.1, 0.9], 64, [6, 2]), ([100, 100], [1, 3], 64, [16, 48]), ([9, 9], [1, 99], 4, [1, 4]), ([3], [2], 64, [3])],
)
def test_samples_of_an_evaluation(sizes: list[int], weights: list[float], asked: int, expected: list[int]):
    parts = [ValidationPart("", weight, range(size)) for size, weight in zip(sizes, weights, strict=True)]  # type: ignore[arg-type]
    assert samples_of_parts(parts, asked) == expected


def test_a_mixture_in_a_mixture_keeps_names_and_weights(files: dict[str, str]):
    inner = {
        "_target_": "meshloom.data.mixture.Mixture",
        "sources": {"few": node(files["few"]), "many": node(files["many"])},
        "weights": {"few": 1, "many": 3},
        "block": 20,
    }
    mixed = mixed_sources({"text": inner, "more": node(files["few"])}, weights={"text": 2, "more": 1}, tokenizer="bytes")
    assert mixed.problems() == []
    mixed.prepare()
    shares = {part.name: part.weight for part in validation_parts(mixed)}
    assert shares == {"text.few": 0.5, "text.many": 1.5, "more": 1}


def test_one_tokenizer_is_trained_on_all(files: dict[str, str]):
    mixed = mixture(files, tokenizer="bpe", vocabulary=290)
    mixed.prepare()
    assert mixed.tokenizer is not None
    assert len(mixed.tokenizer.encode("few many")) <= 5  # both words were learned
    fingerprints = {node.tokenizer.fingerprint for node in mixed.nodes.values()}  # type: ignore[union-attr]
    assert fingerprints == {mixed.tokenizer.fingerprint}


def test_ready_shards_bring_their_tokenizer(files: dict[str, str], tmp_path: Path):
    for name, vocabulary in (("one", 270), ("two", 280)):
        done = command.main(["tokenize", f"input={files['few']}", f"output={tmp_path}/{name}", f"vocabulary={vocabulary}"])
        assert done == 0
    shards = [
        {"_target_": "meshloom.data.nodes.Tokenized", "path": f"{tmp_path}/{name}", "seq_len": 1} for name in ("one", "two")
    ]
    mixed = mixed_sources({"a": shards[0], "b": node(files["many"])})
    mixed.prepare()
    assert mixed.vocabulary == 270
    with pytest.raises(ConfigError, match=r"data\.sources\.b: its tokens come from another tokenizer"):
        mixed_sources({"a": shards[0], "b": shards[1]}).prepare()
    with pytest.raises(ConfigError, match=r"another tokenizer"):
        mixed_sources({"a": shards[0]}, tokenizer="bytes").prepare()
    synthetic = {"_target_": "meshloom.data.synthetic.Synthetic", "seq_len": 8, "vocabulary": 99}
    with pytest.raises(ConfigError, match=r"data\.sources: vocabularies differ"):
        mixed_sources({"a": shards[0], "b": synthetic}, vocabulary=99).prepare()


def test_all_problems_at_once(files: dict[str, str]):
    sources = {"few": node("gone.jsonl"), "many": node(files["many"], tokenizer="bytes", validation=2)}
    mixed = mixed_sources(sources, weights={"few": -1, "other": 1}, vocabulary=5)
    assert {problem.key for problem in mixed.problems()} == {
        "data.vocabulary",
        "data.weights.other",
        "data.weights.few",
        "data.weights.many",
        "data.sources.few.input",
        "data.sources.many.tokenizer",
        "data.sources.many.validation",
    }
    for wrong in (float("inf"), float("nan"), "much"):
        (problem,) = mixture(files, weights={"few": 1, "many": wrong}).problems()
        assert f"data.weights.many: {wrong} is no share" in str(problem)
    (problem,) = mixture(files, weights={"few": 1, "many": 999}).problems()
    assert str(problem) == "data.block: a share of 0.001 is no sample in 20; use 1000 or more"
    assert [problem.key for problem in mixture(files, block=0).problems()] == ["data.block"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"inptu": "x"}, "data.sources.bad.inptu: there is no such key; did you mean input?"),
        ({"validation": "much"}, "data.sources.bad.validation: Value 'much' of type 'str' could not be converted to Float"),
        ({"_target_": None}, "data.sources.bad._target_: the source has no kind; choose one in the recipe's defaults"),
        ({"_target_": "nowhere.Data"}, "data.sources.bad: can't be built: nowhere.Data can't be imported: No module named"),
        ({"_target_": f"{__name__}.Broken"}, "data.sources.bad: can't be built: no water in the well"),
    ],
)
def test_a_source_that_is_wrong_is_named_with_its_cause(files: dict[str, str], wrong: dict[str, Any], said: str):
    values = {key: value for key, value in {**node(files["few"]), **wrong}.items() if value is not None}
    (problem,) = mixed_sources({"bad": values, "many": node(files["many"])}).problems()
    assert str(problem).startswith(said) and problem.fix


class Broken:
    """A user's source that can't be built."""

    def __init__(self, **keys: Any) -> None:
        raise ValueError("no water in the well")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_an_empty_source_is_named_by_its_name(files: dict[str, str], tmp_path: Path, tokenizer: str):
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    sources = {"c4.en": node(files["many"]), "c4.fr": node(str(tmp_path / "none.jsonl"))}
    mixed = mixed_sources(sources, weights={"c4.en": 1, "c4.fr": 1}, tokenizer=tokenizer, vocabulary=300)
    assert mixed.problems() == []
    with pytest.raises(ConfigError, match=r"data\.sources\.c4\.fr: the corpus 'jsonl' has no document"):
        mixed.prepare()


def test_shards_of_a_source_are_named_by_its_name(tmp_path: Path, files: dict[str, str]):
    assert command.main(["tokenize", f"input={files['few']}", f"output={tmp_path}/one", "vocabulary=270"]) == 0
    shards = {"_target_": "meshloom.data.nodes.Tokenized", "path": f"{tmp_path}/one", "seq_len": 1}
    with pytest.raises(ConfigError, match=r"data\.sources\.small\.seq_len: .*too few for one sample"):
        Mixture(DataMixtureConfig(seq_len=10**6, sources={"small": shards}, weights={"small": 1}), 1).prepare()


RECIPES = {
    "as Hydra composes": """
defaults: [base_mixture, {/data@sources.c4.en: jsonl}, {/data@sources.c4.fr: jsonl}, _self_]
sources: {c4.en: {input: EN}, c4: {fr: {input: FR}}}
weights: {c4.en: 1, c4.fr: 2}
""",
    "written out": """
defaults: [base_mixture, _self_]
sources:
  c4.en: {_target_: meshloom.data.nodes.Jsonl, input: EN}
  c4.fr: {_target_: meshloom.data.nodes.Jsonl, input: FR}
weights: {c4: {en: 1, fr: 2}}
""",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_names_of_sources_may_have_dots(files: dict[str, str], tmp_path: Path, recipe: str):
    (tmp_path / "recipes/data").mkdir(parents=True)
    text = RECIPES[recipe].replace("EN", files["few"]).replace("FR", files["many"])
    (tmp_path / "recipes/data/mine.yaml").write_text(text)
    words = [
        "data=mine",
        "data.seq_len=8",
        "data.weights.c4.fr=3",
        "data.sources.c4.en.validation=0.25",
        "data.tokenizer=bytes",
    ]
    composition = make_composer(str(tmp_path / "recipes")).compose(words)
    assert composition.problems == []
    config, problems = typed_config(composition.config)
    assert problems == []
    mixed = build_node(config.data, 1, None)
    assert isinstance(mixed, Mixture) and mixed.problems() == [] and mixed.weights == {"c4.en": 1, "c4.fr": 3}
    mixed.prepare()
    assert [part.name for part in validation_parts(mixed)] == ["c4.en", "c4.fr"]
    sides = key_sides(config)
    assert sides["data.sources.c4.en.input"] is Side.PLACEMENT and sides["data.sources.c4.en.validation"] is Side.RECIPE


def test_a_recipe_of_ones_own(files: dict[str, str], tmp_path: Path):
    (tmp_path / "recipes/data").mkdir(parents=True)
    (tmp_path / "recipes/data/mine.yaml").write_text(
        f"""
defaults:
  - base_mixture
  - /data@sources.few: jsonl
  - /data@sources.many: jsonl
  - _self_
sources:
  few: {{input: {files["few"]}}}
  many: {{input: {files["many"]}}}
weights: {{few: 1, many: 2}}
tokenizer: bytes
"""
    )
    composition = make_composer(str(tmp_path / "recipes")).compose(["data=mine", "data.weights.few=2", "data.seq_len=8"])
    assert composition.problems == []
    config, problems = typed_config(composition.config)
    assert problems == []
    mixed = build_node(config.data, 1, None)
    assert isinstance(mixed, Mixture) and all(isinstance(node, Jsonl) for node in mixed.nodes.values())
    assert mixed.problems() == []
    mixed.prepare()
    assert mixed.train().blend.counts == [500, 500]


def test_shards_that_end_their_documents_otherwise_are_refused(files: dict[str, str], tmp_path: Path):
    for name, end in (("same", 256), ("other", 7)):
        with ShardWriter(tmp_path / name, 257, end) as writer:
            writer.add(np.array([*range(20), end]))
        shards = {"_target_": "meshloom.data.nodes.Tokenized", "path": f"{tmp_path}/{name}", "seq_len": 1}
        mixed = mixed_sources({"a": shards, "b": node(files["many"])}, tokenizer="bytes")
        if end == 256:
            mixed.prepare()
        else:
            with pytest.raises(ConfigError, match=r"data\.sources: the tokens that end a document differ"):
                mixed.prepare()
