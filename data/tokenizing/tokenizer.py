"""Tokenizers: byte-level BPE trained on the corpus, bytes, or a `tokenizer.json` of any origin."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from ...config.lazy import numpy as np
from ..documents.marked import MarkedText, learned_tokens
from .fill_in_the_middle import NAMES as FIM_NAMES
from .long_documents import encode_long

if TYPE_CHECKING:
    from numpy.typing import NDArray

END_OF_DOCUMENT = "<|endoftext|>"
# Names of the end-of-document token in well-known tokenizers, in the order they are looked for.
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "<|eod|>", "</s>", "<eos>")
SMALLEST_BPE = 257  # all bytes and the end of a document
_PIECE = 1 << 20  # characters: longer documents are cut for encoding, which needs some hundred bytes per character


def byte_alphabet() -> list[str]:
    """List the printable character of each byte in byte-level tokenizers (GPT-2's table), by byte value."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


class Tokenizer:
    """Text ↔ token ids.

    vocabulary       ids lie in [0, vocabulary)
    end_of_document  id of the token put behind every document
    fill_in_the_middle  ids of the prefix, suffix and middle tokens; None where there are none
    fingerprint      digest of its contents
    """

    def __init__(self, engine: Engine, end_of_document: str | int | None = None) -> None:
        """end_of_document: the token's name or id; None: the first of the well-known names that there is."""
        engine.no_padding()
        engine.no_truncation()
        # The text "<|endoftext|>" in a corpus must not end a document.
        engine.encode_special_tokens = True
        self._engine = engine
        known = engine.get_vocab(with_added_tokens=True)
        if isinstance(end_of_document, int):
            end_of_document = engine.id_to_token(end_of_document) or f"with id {end_of_document}"
        names = KNOWN_ENDS if end_of_document is None else (end_of_document,)
        found = next((name for name in names if name in known), None)
        if found is None:
            raise ValueError(
                f"data.end_of_document: the tokenizer has no token {' or '.join(repr(name) for name in names)}; "
                "name the one that ends a document"
            )
        self.end_of_document = known[found]
        fim = next((names for names in FIM_NAMES if all(name in known for name in names)), None)
        self.fill_in_the_middle = None if fim is None else (known[fim[0]], known[fim[1]], known[fim[2]])
        self.vocabulary = max(known.values()) + 1
        self.fingerprint = xxhash.xxh3_128_hexdigest(f"{engine.to_str()}\n{found}".encode())

    @classmethod
    def load(cls, path: Path, end_of_document: str | int | None = None) -> Tokenizer:
        """Read a `tokenizer.json`, or the one in a folder; see `__init__`. Raises ValueError naming the file."""
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"data.tokenizer: {path} not found; give bpe, bytes, or the path of a tokenizer.json")
        try:
            engine = Engine.from_file(str(path))
        except Exception as problem:  # the library raises bare Exception
            raise ValueError(f"data.tokenizer: {path} is not a tokenizer.json ({problem})") from problem
        return cls(engine, end_of_document)

    @classmethod
    def bytes(cls, *, fim: bool = False) -> Tokenizer:
        """Build a tokenizer whose tokens are the bytes of the UTF-8 text, the ids their values; 256 ends a document.

        fim: with the tokens of fill-in-the-middle behind it
        """
        vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
        engine = Engine(models.BPE(vocab=vocabulary, merges=[]))
        _byte_level(engine)
        engine.add_special_tokens([END_OF_DOCUMENT, *(FIM_NAMES[0] if fim else ())])
        return cls(engine)

    @classmethod
    def train(cls, documents: Iterable[str], vocabulary: int, *, fim: bool = False) -> Tokenizer:
        """Train byte-level BPE (Sennrich et al., arXiv 1508.07909; byte level: GPT-2). It can encode any text.

        A small corpus may yield fewer merges than requested: read `vocabulary` of the result. fim: see `bytes`
        """
        assert vocabulary >= SMALLEST_BPE
        engine = Engine(models.BPE())
        _byte_level(engine)
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_OF_DOCUMENT, *(FIM_NAMES[0] if fim else ())],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        engine.train_from_iterator(documents, trainer)
        return cls(engine)

    def byte_lengths(self) -> NDArray[np.int64]:
        """Return the bytes of UTF-8 text that each token stands for, (vocabulary,) int64; 0 for special tokens.

        The lengths of a text's tokens add up to the text's. A tokenizer of SentencePiece's kind may put a space before a
        document, which then counts.
        """
        alphabet = frozenset(byte_alphabet())
        described = json.loads(self._engine.to_str())
        added = {token["id"]: token for token in described["added_tokens"]}
        byte_level = '"ByteLevel"' in json.dumps([described["decoder"], described["pre_tokenizer"]])
        lengths = np.zeros(self.vocabulary, np.int64)
        for text, token in self._engine.get_vocab(with_added_tokens=True).items():
            if token in added:
                lengths[token] = 0 if added[token]["special"] else len(text.encode())
            elif byte_level and alphabet.issuperset(text):
                lengths[token] = len(text)
            else:
                lengths[token] = 1 if re.fullmatch("<0x[0-9A-F]{2}>", text) else len(text.replace("▁", " ").encode())
        lengths[self.end_of_document] = 0
        return lengths

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json` and wait until it is on disk. Raises OSError (the library's writer raises Exception)."""
        with path.open("w", encoding="utf-8") as file:
            file.write(self._engine.to_str(pretty=True))
            file.flush()
            os.fsync(file.fileno())  # the folder that it is built into counts as complete once it is renamed

    def encode(self, text: str, *, specials: bool = False, post_process: bool = False) -> list[int]:
        """Encode a text as token ids, without an end of document.

        specials: names of special tokens stand for these tokens
        post_process: with the tokens that tokenizer.json puts around a text, such as a beginning, unless it begins with that
        """
        self._engine.encode_special_tokens = not specials
        try:
            plain = self._engine.encode(text, add_special_tokens=False).ids
            if not post_process:
                return plain
            whole = self._engine.encode(text).ids
            return plain if plain[:1] == whole[:1] else whole
        finally:
            self._engine.encode_special_tokens = True

    def token_id(self, name: str) -> int | None:
        """Return the id of the token of this name; None where there is none."""
        return self._engine.token_to_id(name)

    def name_of(self, token: int) -> str:
        """Return the name of a token, as its vocabulary has it."""
        return self._engine.id_to_token(token) or f"<{token}>"

    def encode_documents(self, texts: Sequence[str], *, in_pieces: bool = False) -> list[NDArray[np.int64]]:
        """Encode many documents as token ids, each with its end of document, on all CPU cores.

        in_pieces: encode each piece of a long document by itself, as version 1 of the rules does (`version.py`)
        """
        pieces: list[str] = []
        counts: list[int] = []
        for text in texts:
            cut = _cut(text) if in_pieces else [text] if len(text) <= _PIECE else []
            pieces += cut
            counts.append(len(cut))
        encoded = iter(self._engine.encode_batch_fast(pieces, add_special_tokens=False))
        end = np.array([self.end_of_document], dtype=np.int64)
        documents: list[NDArray[np.int64]] = []
        for text, count in zip(texts, counts, strict=True):
            parts = [np.array(next(encoded).ids, dtype=np.int64) for _ in range(count)]
            if not parts:
                parts = [encode_long(text, _PIECE, lambda part: self._engine.encode(part, add_special_tokens=False))]
            documents.append(np.concatenate([*parts, end]))
        return documents

    def encode_marked(self, texts: Sequence[MarkedText]) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """Encode documents with a loss mask, on all CPU cores.

        Returns of each its token ids, the end of document among them, and whether each carries loss.
        """
        found: list[tuple[NDArray[np.int64], NDArray[np.bool_]]] = []
        for specials, alike in groupby(texts, lambda text: text.specials):
            group = list(alike)
            self._engine.encode_special_tokens = not specials
            try:
                encoded = self._engine.encode_batch([str(text) for text in group], add_special_tokens=False)
            finally:
                self._engine.encode_special_tokens = True
            for text, encoding in zip(group, encoded, strict=True):
                tokens = np.array([*encoding.ids, self.end_of_document], np.int64)
                found.append((tokens, learned_tokens(text, encoding.offsets)))
        return found

    def decode(self, tokens: Sequence[int] | NDArray[np.int64]) -> str:
        """Decode token ids to text. Ends of documents are left out; broken UTF-8 becomes replacement characters."""
        return self._engine.decode([int(token) for token in tokens], skip_special_tokens=True)


def _byte_level(engine: Engine) -> None:
    # The library's attributes are typed read-only in its stubs, though setting them is its documented use.
    setattr(engine, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))  # noqa: B010
    setattr(engine, "decoder", decoders.ByteLevel())  # noqa: B010


def _cut(text: str) -> list[str]:
    """Cut a text into pieces of at most `_PIECE` characters, behind a line where there is one."""
    pieces: list[str] = []
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        pieces.append(text[start:end])
        start = end
    pieces.append(text[start:])
    return pieces
