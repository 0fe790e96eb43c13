"""Fill-in-the-middle: a function of seed and document, which loses no character and marks its parts by tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash
from tokenizers import Tokenizer as Engine
from tokenizers import models

from meshloom.config.problems import ConfigError
from meshloom.data.build import build_node
from meshloom.data.config import TextConfig
from meshloom.data.tokenizing.fill_in_the_middle import FillInTheMiddle
from meshloom.data.tokenizing.tokenizer import Tokenizer

TEXTS = [f"document {number}: a quick brown – fox 😀 jumps" for number in range(400)]


def parts(tokens: list[int], tokenizer: Tokenizer) -> tuple[str, str, str, bool]:
    """Prefix, middle and suffix of an encoded document, and whether its suffix comes first; the oracle's own reading."""
    assert tokenizer.fill_in_the_middle is not None
    pre, suf, mid = (tokens.index(token) for token in tokenizer.fill_in_the_middle)
    assert tokens[-1] == tokenizer.end_of_document and pre == 0
    ends = len(tokens) - 1
    return *(tokenizer.decode(tokens[a + 1 : b]) for a, b in ((pre, suf), (mid, ends), (suf, mid))), suf == 1  # type: ignore[return-value]


def test_cut_documents_hold_every_character_once() -> None:
    fim, tokenizer = FillInTheMiddle(0.5, 0.5, 7), Tokenizer.bytes(fim=True)
    encoded = [each.tolist() for each in fim.encode(tokenizer, 0, TEXTS)]
    assert tokenizer.fill_in_the_middle is not None
    cut = [number for number, tokens in enumerate(encoded) if tokens[0] == tokenizer.fill_in_the_middle[0]]
    assert 160 < len(cut) < 240
    suffix_first = 0
    for number in cut:
        prefix, middle, suffix, first = parts(encoded[number], tokenizer)
        suffix_first += first
        assert prefix + middle + suffix == TEXTS[number], "in SPM the prefix stands with the middle"
    assert 60 < suffix_first < len(cut) - 60
    whole = set(range(len(TEXTS))) - set(cut)
    assert all(encoded[number] == tokenizer.encode_documents([TEXTS[number]])[0].tolist() for number in whole)


def test_a_cut_depends_on_seed_and_number_alone() -> None:
    fim, tokenizer = FillInTheMiddle(0.5, 0.5, 7), Tokenizer.bytes(fim=True)
    whole = [each.tolist() for each in fim.encode(tokenizer, 0, TEXTS)]
    again = [each.tolist() for first in range(0, 400, 100) for each in fim.encode(tokenizer, first, TEXTS[first : first + 100])]
    assert again == whole
    assert [each.tolist() for each in FillInTheMiddle(0.5, 0.5, 8).encode(tokenizer, 0, TEXTS)] != whole


def test_the_data_node_trains_with_it_and_refuses_by_key(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("|".join(TEXTS))
    keys = {"input": f"{tmp_path}/text.txt", "separator": "|", "seq_len": 16, "cache_dir": str(tmp_path / "cache")}
    made = build_node(TextConfig(**keys, tokenizer="bytes", fim_rate=1.0), 3, None)  # type: ignore[arg-type]
    assert made.problems() == []
    made.prepare()
    assert made.vocabulary == 260, "the bytes, the end of a document, and three tokens"
    shards = made.shards  # type: ignore[attr-defined]
    assert (shards.read(0, shards.tokens) == 257).sum() == shards.documents
    wrong = build_node(TextConfig(**keys, fim_rate=2.0, version=1), 3, None)  # type: ignore[arg-type]
    assert {problem.key for problem in wrong.problems()} >= {"data.fim_rate", "data.version"}
    Tokenizer.bytes().save(tmp_path / "plain.json")
    bare = build_node(TextConfig(**keys, tokenizer=f"{tmp_path}/plain.json", fim_rate=0.5), 3, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as refused:
        bare.prepare()
    assert [problem.key for problem in refused.value.problems] == ["data.fim_rate"]


def test_no_copy_is_trained_on_of_a_text_that_is_held_out(tmp_path: Path) -> None:
    texts = sorted((letter * 3000 for letter in "abcdef"), key=lambda text: xxhash.xxh3_64_intdigest(text.encode()))
    (tmp_path / "text.txt").write_text("|".join([*texts, *texts[2:]]))  # windows lie at the end of this order
    keys = {"input": f"{tmp_path}/text.txt", "separator": "|", "seq_len": 16, "cache_dir": str(tmp_path / "cache")}
    made = build_node(TextConfig(**keys, tokenizer="bytes", fim_rate=0.5, validation=0.05), 3, None)  # type: ignore[arg-type]
    made.prepare()
    held = made.validation_shards  # type: ignore[attr-defined]
    letters = {token for token in held.read(0, held.tokens).tolist() if token < 256}
    assert letters and letters <= {ord(text[0]) for text in texts[:2]}
    assert held.tokens == pytest.approx(1500, rel=0.25)


def test_deepseek_s_tokens_are_known() -> None:
    """Written as in the tokenizer.json of DeepSeek-Coder: a full-width bar and a block for a space."""
    engine = Engine(models.BPE(vocab={"a": 0}, merges=[]))
    engine.add_special_tokens(
        ["<|endoftext|>", *(f"<\N{FULLWIDTH VERTICAL LINE}fim\u2581{name}\uff5c>" for name in ("hole", "begin", "end"))]
    )
    assert Tokenizer(engine).fill_in_the_middle == (3, 2, 4), "begin, hole, end: prefix, suffix, middle"
