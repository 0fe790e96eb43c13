"""Data nodes of the config group `data`, one per option; `mixture` and `synthetic` have files of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from ..config.cache import expand_user
from ..config.problems import Problem
from .corpus import Corpus, CorpusOptions, Packed, PackingOptions
from .records import HuggingFace, JsonLines, ParquetFiles
from .shards import MANIFEST
from .sources import StandardLibrary, TextFiles


class Stdlib(Corpus):
    """`data=stdlib`: the standard library source of the running interpreter."""

    def __init__(self, seed: int, **options: Unpack[CorpusOptions]) -> None:
        super().__init__(StandardLibrary(), seed, **options)


class Text(Corpus):
    """`data=text`: files of UTF-8 text."""

    def __init__(
        self, seed: int, input: str | Sequence[str] | None, separator: str | None = None, **options: Unpack[CorpusOptions]
    ) -> None:
        super().__init__(TextFiles(input, separator), seed, **options)


class Jsonl(Corpus):
    """`data=jsonl`: a JSON object per line."""

    def __init__(
        self, seed: int, input: str | Sequence[str] | None, field: str = "text", **options: Unpack[CorpusOptions]
    ) -> None:
        super().__init__(JsonLines(input, field), seed, **options)


class Parquet(Corpus):
    """`data=parquet`: a column of text."""

    def __init__(
        self, seed: int, input: str | Sequence[str] | None, field: str = "text", **options: Unpack[CorpusOptions]
    ) -> None:
        super().__init__(ParquetFiles(input, field), seed, **options)


class Hf(Corpus):
    """`data=hf`: a data set of the Hugging Face `datasets` library."""

    def __init__(
        self,
        seed: int,
        path: str | None,
        subset: str | None = None,
        split: str = "train",
        field: str = "text",
        revision: str | None = None,
        **options: Unpack[CorpusOptions],
    ) -> None:
        super().__init__(HuggingFace(path, subset, split, field, revision), seed, **options)


class Shards(Packed):
    """`data=shards`: tokens that were made before (`meshloom data tokenize`).

    path        folder with `train/` (and optionally `validation/`), or a single shard folder, which then is training data
    validation  another folder of validation shards; null: `path/validation` where it exists
    """

    def __init__(self, seed: int, path: str | None, validation: str | None = None, **options: Unpack[PackingOptions]) -> None:
        super().__init__(seed, **options)
        self._path = expand_user(path or "")
        self._given = bool(path)
        self._held = None if validation is None else expand_user(validation)

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

    def prepare(self) -> None:
        """Open the shards."""
        train = self._train_folder()
        held = self._path / "validation"
        self.open(train, self._held or (held if train != self._path and held.exists() else None))
