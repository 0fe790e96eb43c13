"""Samples as text: spans by document and loss, padding, and tokens that go on from others."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers

from meshloom.data.batch import IGNORED, Sample
from meshloom.data.samples.sample_text import SampleSpan, padding_of, sample_spans
from meshloom.data.tokenizing.decoding import decode_behind
from meshloom.data.tokenizing.tokenizer import Tokenizer

END = 256


def sample(texts: list[str], mask: list[int], padding: int) -> Sample:
    """Documents of bytes with their ends, of which the positions of `mask` carry no loss; padding behind them."""
    tokens = [token for text in texts for token in (*text.encode(), END)] + [END] * padding
    documents = np.repeat(np.arange(len(texts) + 1), [*(len(text.encode()) + 1 for text in texts), padding])
    targets = np.array([*tokens[1:], IGNORED])
    targets[np.flatnonzero(np.diff(documents))] = IGNORED
    targets[len(tokens) - padding - 1 :] = IGNORED
    targets[[place - 1 for place in mask]] = IGNORED
    return Sample(np.array(tokens), targets, documents)


def test_spans_are_cut_at_documents_and_at_the_loss_mask() -> None:
    one = sample(["Hallo du", "ja"], mask=[1, 2, 3, 4], padding=3)
    assert padding_of(one, END) == 3
    assert sample_spans(one, Tokenizer.bytes()) == [
        SampleSpan("Hallo", 0, 5, 0, False),
        SampleSpan(" du<|endoftext|>", 5, 9, 0, True),
        SampleSpan("j", 9, 10, 1, False),
        SampleSpan("a<|endoftext|>", 10, 12, 1, True),
    ]
    numbers = sample_spans(one, None)
    assert numbers[2].text == str(ord("j"))


def test_a_sample_of_nothing_but_padding_has_no_spans() -> None:
    empty = Sample(np.full(4, END), np.full(4, IGNORED))
    assert padding_of(empty, END) == 4 and sample_spans(empty, Tokenizer.bytes()) == []


def metaspace() -> Tokenizer:
    """A tokenizer of SentencePiece's kind, as Llama 2's: it writes no space at the beginning of a text."""
    words = ["<unk>", "</s>", "▁the", "▁sun", "▁shines", "s"]
    engine = Engine(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    setattr(engine, "pre_tokenizer", pre_tokenizers.Metaspace())  # noqa: B010
    setattr(engine, "decoder", decoders.Metaspace())  # noqa: B010
    engine.add_special_tokens(["</s>"])
    return Tokenizer(engine)


def test_tokens_behind_others_keep_their_space() -> None:
    tokenizer = metaspace()
    assert tokenizer.decode([3, 4]) == "sun shines"
    assert decode_behind(tokenizer.decode, [2], [3, 4]) == " sun shines"
    assert decode_behind(tokenizer.decode, [2] * 40, [3, 5]) == " suns"
    assert decode_behind(tokenizer.decode, [], [3]) == decode_behind(tokenizer.decode, [1], [3]) == "sun"


def test_a_character_belongs_to_the_tokens_that_begin_it() -> None:
    decode, tokens = Tokenizer.bytes().decode, [*"aü€b".encode()]
    assert decode_behind(decode, tokens[:1], tokens[1:]) == "ü€b"
    assert decode_behind(decode, tokens[:3], tokens[3:]) == "€b"
    assert decode_behind(decode, tokens[:4], tokens[4:]) == "€b"  # of the three bytes of the character, one is before
    assert decode_behind(decode, [ord("a"), 0xFF], [*b"b"]) == "b"
