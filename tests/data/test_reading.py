"""Reading on: no sample of a source comes twice, or never, when a run goes on with other shares or other data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from meshloom.data.build import build_node
from meshloom.data.config import DataMixtureConfig, JsonlConfig
from meshloom.data.node import DataNode
from meshloom.data.reading import read_on, samples_read, shifted


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora of words that tell their samples apart."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, letter in (("few", "a"), ("many", "z")):
        lines = [f'{{"text": "{letter}{number:04d}"}}\n' for number in range(200)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def mixture(files: Path, few: float, many: float, **keys: Any) -> DataNode:
    jsonl = "meshloom.data.nodes.Jsonl"
    sources = {name: {"_target_": jsonl, "input": f"{files}/{name}.jsonl", "validation": 0.0} for name in ("few", "many")}
    values = {"seq_len": 6, "tokenizer": "bytes", "weights": {"few": few, "many": many}, "block": 10, **keys}
    return prepared(DataMixtureConfig(sources=sources, cache_dir=str(files), **values))


def prepared(config: Any) -> DataNode:
    node = build_node(config, 7, None)
    assert node.problems() == []
    node.prepare()
    return node


def texts(node: DataNode, samples: Any, numbers: Iterable[int]) -> list[str]:
    assert node.tokenizer is not None
    return [node.tokenizer.decode(samples[number].tokens[:5]) for number in numbers]


def test_other_shares_of_the_same_sources_repeat_and_miss_nothing(files: Path) -> None:
    """Blocks of ten samples that are not read to their ends: what is left of them comes first in the next stage."""
    plans = [((1, 4), 13), ((1, 1), 17), ((0, 1), 9), ((1, 1), 1), ((4, 1), 2), ((1, 1), 20)]
    seen, read = list[str](), dict[str, int]()
    for shares, count in plans:
        node = mixture(files, *shares)
        seen += texts(node, read_on(node, read), range(count))
        read = samples_read(node, count, read)
    node = mixture(files, 1, 1)
    for name, letter in (("few", "a"), ("many", "z")):
        mine = [text for text in seen if text.startswith(letter)]
        (known,) = (known for source, known in read.items() if f"/{name} " in source)
        first, *left = known
        source = node.nodes[name]  # type: ignore[attr-defined]
        numbers = [number for number in range(first) if number not in left]
        assert sorted(mine) == sorted(texts(node, source.train(), numbers)) and len(set(mine)) == len(mine)
        assert len(left) < 10
    assert len(seen) == sum(count for _, count in plans)


def test_a_source_goes_on_after_a_stage_without_it(files: Path) -> None:
    alone = prepared(
        JsonlConfig(seq_len=6, tokenizer="bytes", input=f"{files}/few.jsonl", validation=0.0, cache_dir=str(files))
    )
    read = samples_read(mixture(files, 1, 1), 10, samples_read(alone, 5, {}))
    assert texts(alone, read_on(alone, read), range(3)) == texts(alone, alone.train(), range(5, 8))


def test_another_length_of_samples_begins_anew(files: Path) -> None:
    read = samples_read(mixture(files, 1, 1), 10, {})
    longer = mixture(files, 1, 1, seq_len=9)
    assert texts(longer, read_on(longer, read), range(4)) == texts(longer, longer.train(), range(4))


def test_shifted_samples_have_other_numbers(files: Path) -> None:
    node = mixture(files, 1, 1)
    assert texts(node, shifted(node.train(), -20), range(20, 24)) == texts(node, node.train(), range(4))
    assert shifted(samples := node.train(), 0) is samples
