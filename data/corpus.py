"""Data nodes that start from documents: they find or build tokenizer and shards, then serve samples in order R1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import xxhash

from ..config.cache import cache_folder, expand_user
from ..config.hashing import hash64
from ..config.per_host import attempt_folder, is_first_on_host
from ..config.problems import ConfigError, Problem
from .config import CorpusConfig, DataMixtureConfig, PackingConfig
from .documents.chat import MADE
from .documents.sources import DocumentSource
from .samples.order import Shuffled, StoredSamples, ValidationSamples
from .samples.packing import PACKINGS, pack
from .shards.manifest import ShardError
from .shards.reader import TokenShards
from .tokenizing.fill_in_the_middle import FillInTheMiddle
from .tokenizing.prepare import tokenize_corpus, train_tokenizer
from .tokenizing.tokenizer import SMALLEST_BPE, Tokenizer
from .version import NEWEST, version_problems


@dataclass(frozen=True)
class TokenizerSettings:
    """The keys about the tokenizer.

    setting          bpe (trained on the sources), bytes, or the path of a tokenizer.json
    vocabulary       of a trained one
    sample           characters it is trained on, at most
    end_of_document  of one from a file: the token's name
    fim              whether one that is made needs the tokens of fill-in-the-middle
    """

    setting: str
    vocabulary: int
    sample: int
    end_of_document: str | None
    fim: bool = False

    @classmethod
    def of(cls, config: CorpusConfig | DataMixtureConfig) -> TokenizerSettings:
        """Return the settings of a data node; of a mixture, those that all its sources need."""
        if isinstance(config, DataMixtureConfig):
            nodes = [node for node in config.named_sources.values() if isinstance(node, Mapping)]
            fim = any(cast(Mapping[str, Any], node).get("fim_rate") for node in nodes)
        else:
            fim = config.fim_rate > 0
        return cls(config.tokenizer, config.vocabulary, config.tokenizer_sample, config.end_of_document, fim)

    def problems(self, key: str) -> list[Problem]:
        """Return what is wrong with these keys."""
        found: list[Problem] = []
        if self.setting == "bpe" and self.vocabulary < SMALLEST_BPE:
            message = f"{self.vocabulary} is too small for byte-level BPE"
            found.append(Problem(f"{key}.vocabulary", message, f"use {SMALLEST_BPE} or more"))
        if self.setting == "bpe" and self.sample < 1:
            found.append(Problem(f"{key}.tokenizer_sample", f"{self.sample} characters can't train it", "use 1 or more"))
        if self.setting not in MADE and not (self.setting and expand_user(self.setting).exists()):
            fix = "use bpe, bytes, or the path of a tokenizer.json"
            found.append(Problem(f"{key}.tokenizer", f"'{self.setting}' not found", fix))
        return found

    def make(self, sources: Sequence[tuple[DocumentSource, float]], cache: Path, version: int = NEWEST) -> Tokenizer:
        """Train the tokenizer, find it in the cache, or load it.

        sources: each with the share of it that is held out. version: of the rules (`version.py`)
        """
        if self.setting == "bpe":
            return train_tokenizer(sources, self.vocabulary, self.sample, cache, version, fim=self.fim)
        if self.setting == "bytes":
            return Tokenizer.bytes(fim=self.fim)
        return Tokenizer.load(expand_user(self.setting), self.end_of_document)

    def shortage(self, tokenizer: Tokenizer, key: str) -> list[str]:
        """Say if the text that the tokenizer was trained on gave fewer tokens than asked for; an empty list if it did not."""
        if self.setting != "bpe" or tokenizer.vocabulary >= self.vocabulary:
            return []
        sample = f"{key.removesuffix('vocabulary')}tokenizer_sample"
        text = f"the text that the tokenizer is trained on ({sample}: at most {self.sample:,} characters) gave no more"
        return [f"{key}: {tokenizer.vocabulary:,} tokens in place of {self.vocabulary:,}: {text}"]


class Packed:
    """Base of the nodes that read shards: from opened shards to samples."""

    def __init__(self, config: PackingConfig, seed: int) -> None:
        self.seed = seed
        self.seq_len = config.seq_len
        self.version = config.version
        self._packing = config.packing
        self._document_mask = config.document_mask
        # The first rank of a host reads all, and others that wait for it need not.
        self._verify = config.verify and (is_first_on_host() or attempt_folder() is None)
        self._cache = cache_folder(config.cache_dir)
        self._tokenizer: Tokenizer | None = None
        self._shards: tuple[TokenShards, TokenShards | None] | None = None
        self._train: StoredSamples | None = None
        self._validation: StoredSamples | None = None
        self._fingerprint = ""

    def problems(self, key: str = "data") -> list[Problem]:
        """Return what is wrong with the keys about packing."""
        found: list[Problem] = []
        if self.seq_len < 1:
            found.append(Problem(f"{key}.seq_len", f"{self.seq_len} is not a length", "use 1 or more"))
        if self._packing not in PACKINGS:
            found.append(Problem(f"{key}.packing", f"'{self._packing}' is unknown", f"use {' or '.join(PACKINGS)}"))
        return found + version_problems(self.version, key)

    def open(self, train: Path, validation: Path | None, key: str = "data") -> None:
        """Open shards and pack them. Raises ConfigError for too few tokens, ShardError for damaged files."""
        shards = TokenShards(train, self._verify)
        held = None if validation is None else TokenShards(validation, self._verify)
        if held is not None:
            _refuse_other_tokens(held, shards)
        if self._tokenizer is None and shards.tokenizer_file is not None:
            try:
                self._tokenizer = Tokenizer.load(shards.tokenizer_file, shards.manifest.end_of_document)
            except ValueError as problem:
                raise ShardError(f"{train}: its tokenizer can't be used ({problem})") from problem
        self._shards = shards, held
        self._train = self._pack(shards, key)
        self._validation = None if held is None else self._pack(held, key, held_out=True)
        since = "" if self.version == 1 or self._packing == "concat" else " 2"  # packing changed with version 2 of the rules
        packing = self._packing + since
        content = [shards.fingerprint, held.fingerprint if held else "", packing, self.seq_len, self._document_mask]
        self._fingerprint = xxhash.xxh3_128_hexdigest(repr(content).encode())

    def _pack(self, shards: TokenShards, key: str, *, held_out: bool = False) -> StoredSamples:
        """Pack shards into samples. Validation data shorter than one sample make one that is padded."""
        if shards.tokens <= self.seq_len and (shards.tokens < 2 or not held_out):
            said = f"{shards.folder} has {shards.tokens} token{'' if shards.tokens == 1 else 's'}"
            if shards.tokens < 2:
                more = f"a larger {key}.validation, or more data" if held_out else "more data"
                raise ConfigError([Problem(key, f"{said}, and a sample takes two tokens or more", f"give it {more}")])
            fix = f"use at most {shards.tokens - 1}, or more data"
            raise ConfigError([Problem(f"{key}.seq_len", f"{said}, too few for one sample of {self.seq_len}", fix)])
        return pack(shards, self._packing, self.seq_len, self._document_mask, self._cache, self.version, padded=held_out)

    def whole(self, tokenizer: Tokenizer | None, key: str) -> StoredSamples:
        """Return samples of all documents of the node, cut into tokens by `tokenizer`, for validation.

        Raises ConfigError, naming keys of the node `key`, where they can't be.
        """
        raise NotImplementedError

    def _prepared(self) -> StoredSamples:
        if self._train is None:
            raise RuntimeError("prepare() this data node before using it")
        return self._train

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, once prepared."""
        self._prepared()
        return self._tokenizer

    @property
    def vocabulary(self) -> int:
        """Token ids lie in [0, vocabulary); known once prepared."""
        return self._prepared().vocabulary

    @property
    def fingerprint(self) -> str:
        """Digest that names the data, once prepared."""
        self._prepared()
        return self._fingerprint

    @property
    def stored(self) -> StoredSamples:
        """The training samples of one epoch, in the order they are stored."""
        return self._prepared()

    @property
    def shards(self) -> TokenShards:
        """The training shards, once prepared."""
        assert self._shards is not None, "prepare() this data node before using it"
        return self._shards[0]

    @property
    def validation_shards(self) -> TokenShards | None:
        """The validation shards, once prepared; None where nothing is held out."""
        assert self._shards is not None, "prepare() this data node before using it"
        return self._shards[1]

    def train(self) -> Shuffled:
        """Return the endless training samples."""
        return Shuffled(self._prepared(), hash64(self.seed, 0))

    def validation(self) -> ValidationSamples | None:
        """Return the validation samples, or None where nothing is held out."""
        self._prepared()
        return None if self._validation is None else ValidationSamples(self._validation)


def _refuse_other_tokens(held: TokenShards, train: TokenShards) -> None:
    """Raise ShardError if validation shards were made with other tokens than the shards that are trained on."""
    one, other = train.manifest, held.manifest
    if other.vocabulary != one.vocabulary:
        raise ShardError(f"{held.folder}: a vocabulary of {other.vocabulary}, but {one.vocabulary} in {train.folder}")
    if other.end_of_document != one.end_of_document:
        ends = f"{other.end_of_document} ends a document, but {one.end_of_document} in {train.folder}"
        raise ShardError(f"{held.folder}: token {ends}; tokenise both with one end_of_document")
    if one.tokenizer is not None and other.tokenizer is not None and one.tokenizer.xxh3 != other.tokenizer.xxh3:
        raise ShardError(f"{held.folder}: its tokens come from another tokenizer than those of {train.folder}")


class Corpus(Packed):
    """A node that starts from documents."""

    def __init__(self, config: CorpusConfig, seed: int, source: DocumentSource) -> None:
        super().__init__(config, seed)
        self.source = source
        self._settings = TokenizerSettings.of(config)
        self._held_out = config.validation
        # Drawn apart from the order of samples, which is drawn from the seed and 0.
        self._fim = FillInTheMiddle(config.fim_rate, config.fim_spm_rate, hash64(seed, 1)) if config.fim_rate else None

    def problems(self, key: str = "data") -> list[Problem]:
        """Return what is wrong with the node's keys."""
        found = [*super().problems(key), *self.source.problems(key), *self._settings.problems(key)]
        if not 0 <= self._held_out < 1:
            found.append(Problem(f"{key}.validation", f"{self._held_out} is not a fraction", "use 0 (none) up to less than 1"))
        if self._fim is not None:
            found += self._fim.problems(key)
        if self.version == 1 and (self._fim is not None or self.source.masked):
            found.append(
                Problem(f"{key}.version", "version 1 of the rules has no loss mask and no fill-in-the-middle", f"use {NEWEST}")
            )
        if self._fim is not None and self.source.masked:
            found.append(Problem(f"{key}.fim_rate", "a document with a loss mask is not cut", "use 0, or leave the mask out"))
        return found

    @property
    def asked_share(self) -> float:
        """Share of the tokens that is to be held out."""
        return self._held_out

    def whole(self, tokenizer: Tokenizer | None, key: str) -> StoredSamples:
        """Return samples of all documents."""
        if tokenizer is None:
            raise ConfigError([Problem(key, "the training data have no tokenizer", "give token shards (shards)")])
        folder = tokenize_corpus(self.source, tokenizer, 0.0, self._cache, self.version)
        return self._pack(TokenShards(folder / "train", self._verify), key, held_out=True)

    def prepare(self) -> None:
        """Build or find tokenizer and shards."""
        self.prepare_with(self._settings.make([(self.source, self._held_out)], self._cache, self.version))

    def prepare_with(self, tokenizer: Tokenizer, key: str = "data") -> None:
        """Build or find the shards that this tokenizer makes. Raises ConfigError where it lacks tokens that they need."""
        if self._fim is not None and (found := self._fim.tokenizer_problems(tokenizer, key)):
            raise ConfigError(found)
        self._tokenizer = tokenizer
        folder = tokenize_corpus(self.source, tokenizer, self._held_out, self._cache, self.version, self._fim)
        self.open(folder / "train", folder / "validation" if self._held_out else None, key)
