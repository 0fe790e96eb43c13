"""Data nodes of the config group `data`, one per option; `mixture` and `synthetic` have files of their own."""

from __future__ import annotations

from pathlib import Path

from ..config.cache import expand_user
from ..config.problems import ConfigError, Problem
from .config import HfConfig, JsonlConfig, ParquetConfig, RecordConfig, ShardsConfig, StdlibConfig, TextConfig
from .corpus import Corpus, Packed
from .documents.chat import ChatTemplate
from .documents.record_text import RecordText
from .documents.records import HuggingFace, JsonLines, ParquetFiles
from .documents.sources import StandardLibrary, TextFiles
from .samples.order import StoredSamples
from .shards.manifest import MANIFEST, ShardError
from .shards.reader import TokenShards
from .shards.remote import RemoteShards, is_remote
from .tokenizing.tokenizer import Tokenizer


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
    """`data=shards`: tokens that were made before (`meshloom data tokenize`), in a folder or on an object store."""

    def __init__(self, config: ShardsConfig, seed: int) -> None:
        super().__init__(config, seed)
        self._path, self._held = config.path or "", config.validation

    def problems(self, key: str = "data") -> list[Problem]:
        """Return what is wrong with the node's keys."""
        found = super().problems(key)
        fix = "give a folder written by 'meshloom data tokenize'"
        if not self._path:
            found.append(Problem(f"{key}.path", "no folder is named", fix))
        for name, places in (("path", _train_places(self._path)), ("validation", [self._held] if self._held else [])):
            try:
                if places and places[0] and not any(map(_has_shards, places)):
                    found.append(Problem(f"{key}.{name}", f"'{places[0]}' holds no token shards (no {MANIFEST})", fix))
            except ShardError as error:  # of a store
                found.append(Problem(f"{key}.{name}", str(error), "check the URL, the network and your credentials"))
        return found

    def _train_place(self) -> str:
        return next(filter(_has_shards, _train_places(self._path)), self._path)

    def whole(self, tokenizer: Tokenizer | None, key: str) -> StoredSamples:
        """Return samples of all documents of the shards."""
        shards = TokenShards(_local(self._train_place(), self._cache), self._verify)
        if tokenizer is not None and shards.tokenizer_file is not None:
            own = Tokenizer.load(shards.tokenizer_file, shards.manifest.end_of_document)
            if own.fingerprint != tokenizer.fingerprint:
                fix = "tokenise both with one tokenizer and one end_of_document"
                raise ConfigError([Problem(key, "its tokens come from another tokenizer than the training data's", fix)])
        return self._pack(shards, key, held_out=True)

    def prepare(self) -> None:
        """Open the shards; those of an object store are copied into the cache first."""
        train, beside = self._train_place(), _inside(self._path, "validation")
        held = self._held or (beside if train != self._path and _has_shards(beside) else None)
        self.open(_local(train, self._cache), None if held is None else _local(held, self._cache))


def _train_places(path: str) -> list[str]:
    """Return where training shards may be: in the folder itself, or in its `train`."""
    return [path, _inside(path, "train")]


def _inside(path: str, name: str) -> str:
    return f"{path.rstrip('/')}/{name}"


def _has_shards(path: str) -> bool:
    """Return whether a folder has shards. Raises ShardError for a store that can't be read."""
    return RemoteShards(path).exists() if is_remote(path) else (_folder(path) / MANIFEST).is_file()


def _local(path: str, cache: Path) -> Path:
    """Return a folder of shards on a mounted file system."""
    return RemoteShards(path).fetch(cache) if is_remote(path) else _folder(path)


def _folder(path: str) -> Path:
    return expand_user(path.removeprefix("file://"))
