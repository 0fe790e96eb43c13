"""Data nodes of the config group `data`, one per option; `mixture` and `synthetic` have files of their own."""

from __future__ import annotations

from pathlib import Path

from ..config.cache import expand_user
from ..config.problems import ConfigError, Problem
from .chat import ChatTemplate
from .config import HfConfig, JsonlConfig, ParquetConfig, RecordConfig, ShardsConfig, StdlibConfig, TextConfig
from .corpus import Corpus, Packed
from .order import StoredSamples
from .reader import TokenShards
from .record_text import RecordText
from .records import HuggingFace, JsonLines, ParquetFiles
from .shards import MANIFEST
from .sources import StandardLibrary, TextFiles
from .tokenizer import Tokenizer


class Stdlib(Corpus):
    """`data=stdlib`: the standard library source of the running interpreter."""

    def __init__(self, config: StdlibConfig, seed: int) -> None:
        super().__init__(config, seed, StandardLibrary(config.part))


class Text(Corpus):
    """`data=text`: files of UTF-8 text."""

    def __init__(self, config: TextConfig, seed: int) -> None:
        super().__init__(config, seed, TextFiles(config.input, config.separator, config.version, config.markup))


def _record_text(config: RecordConfig) -> RecordText:
    """Return how the records of a node become documents."""
    template = None if config.messages is None else ChatTemplate.find(config.chat_template, config.tokenizer)
    return RecordText(config.field, config.prompt, config.messages, template)


class Jsonl(Corpus):
    """`data=jsonl`: a JSON object per line."""

    def __init__(self, config: JsonlConfig, seed: int) -> None:
        super().__init__(config, seed, JsonLines(config.input, config.field, config.version, _record_text(config)))


class Parquet(Corpus):
    """`data=parquet`: a column of text."""

    def __init__(self, config: ParquetConfig, seed: int) -> None:
        super().__init__(config, seed, ParquetFiles(config.input, config.field, config.version, _record_text(config)))


class Hf(Corpus):
    """`data=hf`: a data set of the Hugging Face `datasets` library."""

    def __init__(self, config: HfConfig, seed: int) -> None:
        record = _record_text(config)
        source = HuggingFace(config.path, config.subset, config.split, config.field, config.revision, record)
        super().__init__(config, seed, source)


class Tokenized(Packed):
    """`data=shards`: tokens that were made before (`meshloom data tokenize`)."""

    def __init__(self, config: ShardsConfig, seed: int) -> None:
        super().__init__(config, seed)
        self._path = expand_user(config.path or "")
        self._given = bool(config.path)
        self._held = None if config.validation is None else expand_user(config.validation)

    def problems(self, key: str = "data") -> list[Problem]:
        """Return what is wrong with the node's keys."""
        found = super().problems(key)
        fix = "give a folder written by 'meshloom data tokenize'"
        if not self._given:
            found.append(Problem(f"{key}.path", "no folder is named", fix))
        elif not (self._train_folder() / MANIFEST).is_file():
            found.append(Problem(f"{key}.path", f"'{self._path}' holds no token shards (no {MANIFEST})", fix))
        if self._held is not None and not (self._held / MANIFEST).is_file():
            found.append(Problem(f"{key}.validation", f"'{self._held}' holds no token shards (no {MANIFEST})", fix))
        return found

    def _train_folder(self) -> Path:
        return self._path if (self._path / MANIFEST).is_file() else self._path / "train"

    def whole(self, tokenizer: Tokenizer | None, key: str) -> StoredSamples:
        """Return samples of all documents of the shards."""
        shards = TokenShards(self._train_folder(), self._verify)
        if tokenizer is not None and shards.tokenizer_file is not None:
            own = Tokenizer.load(shards.tokenizer_file, shards.manifest.end_of_document)
            if own.fingerprint != tokenizer.fingerprint:
                fix = "tokenise both with one tokenizer and one end_of_document"
                raise ConfigError([Problem(key, "its tokens come from another tokenizer than the training data's", fix)])
        return self._pack(shards, key, held_out=True)

    def prepare(self) -> None:
        """Open the shards."""
        train = self._train_folder()
        held = self._path / "validation"
        self.open(train, self._held or (held if train != self._path and held.exists() else None))
