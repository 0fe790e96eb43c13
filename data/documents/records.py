"""Documents in records: JSON lines, parquet, and Hugging Face `datasets`."""

from __future__ import annotations

import codecs
import json
import logging
import os
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import xxhash

from ...config.problems import Problem
from ..version import NEWEST
from . import formats
from .formats import import_extra, missing_extra
from .identity import identity_of
from .record_text import MemberError, RecordText
from .sources import AGAIN, FileSource, SourceFault, files_below, key_below

log = logging.getLogger(__name__)

_MARK = codecs.BOM_UTF8
_FIXES = {
    "input": "give files of records alone",
    "field": "name the member that holds the text",
    "prompt": "name the member that holds the text before it",
    "messages": "name the member that holds the conversation",
}
"""Key that names a member, or the files → what to do where no record has it."""
_MEND = "mend that record, or leave it out"


def _record_fault(place: str, problem: ValueError, record: RecordText, node: str) -> SourceFault:
    """Word what is wrong with a record. node: the source's key"""
    leaf = problem.key if isinstance(problem, MemberError) else record.learned[0]
    return SourceFault(f"{place}: {problem} ({key_below(node, leaf)}); {_FIXES[leaf]}, or {_MEND}")


class TextCount:
    """Counts the records of a source, and those without a text, which make no document."""

    def __init__(self) -> None:
        self._records = self._empty = 0
        self._told = False

    def nonempty(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield the texts that are not empty."""
        self._records = self._empty = 0
        for text in texts:
            self._records += 1
            if text:
                yield text
            else:
                self._empty += 1

    def warn(self, name: str, record: RecordText, node: str) -> None:
        """Warn, the first time that all records were read, of those without a text. node: the source's key"""
        if self._empty and not self._told:
            of = f"{self._empty:,} of {self._records:,} records ({self._empty / self._records:.1%})"
            leaf, field = record.learned
            text = "%s: %s of data=%s have no text in '%s' (null or empty) and are left out"
            log.warning(text, key_below(node, leaf), of, name, field)
        self._told = True


class RecordFiles(FileSource):
    """Files of records; the document is the text in `field`. Warns, once all are read, of records without a text.

    record  how a record becomes a document, where that is not its field alone
    """

    def __init__(
        self,
        input: str | Sequence[str] | None,
        field: str = "text",
        version: int = NEWEST,
        record: RecordText | None = None,
    ) -> None:
        super().__init__(input, version)
        self.record = record or RecordText(field)
        self._count = TextCount()

    @property
    def masked(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True if only a part of each document carries loss."""
        return self.record.masked

    def settings(self) -> str:
        """Name the settings that decide the documents: the members that are read, and how."""
        return f"{self.name} {self.record.settings}"

    def problems(self, key: str) -> list[Problem]:
        """Check the files, and how their records are read."""
        return self.record.problems(key) or super().problems(key)

    def record_fault(self, place: str, problem: ValueError) -> SourceFault:
        """Word what is wrong with a record: file and place in it, the key that names what is read, what to do."""
        return _record_fault(place, problem, self.record, self.key)

    @abstractmethod
    def texts(self, path: Path) -> Iterator[str]:
        """Yield the text of each record of one file; "" where it has none."""

    def read(self, path: Path) -> Iterator[str]:
        """Yield the documents of one file."""
        return filter(None, self.texts(path))

    def documents(self) -> Iterator[str]:
        """Yield the documents of all files."""
        self._warn_of_skipped_files()
        yield from self._count.nonempty(text for path in self.files() for text in self.texts(path))
        self._count.warn(self.name, self.record, self.key)


class JsonLines(RecordFiles):
    """Files of JSON records, plain or compressed; the document is the text in `field`.

    A file has an object per line, or objects one behind the other, or one array of objects. Arrays and objects that span lines
    are held in memory while they are read.
    """

    name = "jsonl"
    endings = tuple(f"{name}{packed}" for name in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst", ".bz2", ".xz"))
    # As C4 and Dolma name their documents. A bare .json beside others is metadata.
    fallback_endings = ((".json.gz", ".json.zst", ".json.bz2", ".json.xz"), (".json",))

    def file_problems(self, key: str, path: Path) -> list[Problem]:
        """Check that the file can be read and that its first record has the field."""
        found = super().file_problems(key, path)
        if found:
            return found
        record = _first_record(formats.head(path))
        try:
            if record is not None:
                self._text(record)
        except ValueError as problem:
            if not isinstance(record, dict):
                what, by = f"the first record of '{path}' is {problem}", "input"
            elif isinstance(problem, MemberError):
                what, by = f"'{path}' has {problem}", problem.key
            else:
                what, by = f"the first record of '{path}' {problem}", self.record.learned[0]
            found.append(Problem(f"{key}.{by}", what, _FIXES[by]))
        return found

    def may_hold_data(self, path: Path) -> bool:
        """Return whether a file that is left out may be data: a bare .json only if its first record has the field."""
        record = _first_record(formats.head(path)) if path.suffix == ".json" else None
        return path.suffix != ".json" or (
            isinstance(record, dict) and all(name in record for name in self.record.members.values())
        )

    def texts(self, path: Path) -> Iterator[str]:
        """Yield the text of each record of one file; "" where it has none."""
        for place, record in self._records(path):
            try:
                text = self._text(record)
            except ValueError as problem:
                raise self.record_fault(f"{path}, {place}", problem) from problem
            yield text

    def _records(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Yield the records of one file, each with its place."""
        if _layout(formats.head(path)) is not _JsonLayout.LINES:
            yield from self._whole_records(path)
            return
        for number, line in enumerate(self.lines(path), 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except UnicodeDecodeError as problem:
                    raise self.fault(f"{path}, line {number}", *formats.not_utf8(path, problem)) from problem
                except (ValueError, RecursionError) as problem:
                    raise self.fault(f"{path}, line {number}", str(problem), _MEND) from problem

    def _whole_records(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Yield the records of a file that is an array of them, or has one behind the other, each with its place."""
        try:
            text = b"".join(self.content(path)).decode("utf-8-sig")
        except UnicodeDecodeError as problem:
            raise self.fault(str(path), *formats.not_utf8(path, problem)) from problem
        place, number = _past_space(text, 0), 0
        while place < len(text):
            try:
                value, place = json.JSONDecoder().raw_decode(text, place)
            except (ValueError, RecursionError) as problem:
                line = problem.lineno if isinstance(problem, json.JSONDecodeError) else 1
                raise self.fault(f"{path}, line {line}", str(problem), _MEND) from problem
            for record in cast(list[Any], value) if isinstance(value, list) else [value]:
                number += 1
                yield f"record {number}", record
            place = _past_space(text, place)

    def _text(self, record: Any) -> str:
        if not isinstance(record, dict):
            raise MemberError("input", "not a JSON object")
        return self.record.of(cast(dict[str, Any], record))


class _JsonLayout(Enum):
    """The arrangement of records in a file of JSON."""

    LINES = "an object per line"
    VALUES = "objects that span lines"
    ARRAY = "an array of objects"


def _layout(start: bytes) -> _JsonLayout:
    """Tell the layout by the first bytes of a file."""
    start = start.removeprefix(_MARK).lstrip()
    if start.startswith(b"["):
        return _JsonLayout.ARRAY
    line, ended, rest = start.partition(b"\n")
    if not ended or not line.startswith(b"{") or not rest.strip():
        return _JsonLayout.LINES
    return _JsonLayout.VALUES if line.rstrip().endswith((b",", b"{", b"[", b":")) else _JsonLayout.LINES


def _past_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _first_record(start: bytes) -> Any | None:
    """Parse the first record of a file by its first bytes; None where it is longer, or no JSON."""
    text = start.removeprefix(_MARK).decode(errors="ignore").lstrip().removeprefix("[").lstrip()
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return None


class ParquetFiles(RecordFiles):
    """Parquet files; the document is the text in the column `field`."""

    name = "parquet"
    endings = (".parquet",)

    def size(self) -> int | None:
        """Return None: files are compressed."""
        return None

    def problems(self, key: str) -> list[Problem]:
        """Check that files match, and that the library is there."""
        return missing_extra("pyarrow", "parquet", key, "data=parquet") or super().problems(key)

    def file_problems(self, key: str, path: Path) -> list[Problem]:
        """Check that the file is a Parquet file with the column."""
        parquet = import_extra("pyarrow.parquet", "parquet", f"reading {path}")
        try:
            names: list[str] = parquet.read_schema(path).names
        except (ValueError, OSError) as problem:  # the library's own errors derive from these two
            return [Problem(f"{key}.input", f"'{path}' can't be read as Parquet ({problem})", "give Parquet files alone")]
        return [
            Problem(f"{key}.{by}", f"'{path}' has no column '{name}' among {', '.join(names)}", _FIXES[by])
            for by, name in self.record.members.items()
            if name not in names
        ]

    def texts(self, path: Path) -> Iterator[str]:
        """Yield the text of each row of one file; "" where it has none."""
        for place, row in self._rows(path):
            try:
                text = self.record.of(row)
            except ValueError as problem:
                raise self.record_fault(f"{path}, {place()}", problem) from problem
            yield text

    def _rows(self, path: Path) -> Iterator[tuple[Callable[[], str], dict[str, Any]]]:
        """Yield the rows of one file, each with what words its place."""
        parquet = import_extra("pyarrow.parquet", "parquet", f"reading {path}")
        number, group_ends = 0, list[int]()

        def place() -> str:
            return f"row {number} counted from 0, in row group {bisect_right(group_ends, number)}"

        try:
            with parquet.ParquetFile(path) as file:
                group_ends += accumulate(file.metadata.row_group(each).num_rows for each in range(file.num_row_groups))
                self._refuse_missing_columns(path, file.schema_arrow.names)
                for batch in file.iter_batches(batch_size=1024, columns=[*self.record.members.values()]):
                    for row in _plain_rows(batch):
                        yield place, row
                        number += 1
        except UnicodeDecodeError as problem:
            raise self.fault(f"{path}, {place()}", f"not UTF-8 text ({problem.reason})", _MEND) from problem
        except SourceFault:
            raise
        except (ValueError, OSError, NotImplementedError) as problem:  # the library's own errors derive from these
            if isinstance(problem, OSError) and problem.errno is not None:
                raise OSError(problem.errno, os.strerror(problem.errno), str(path)) from problem
            what = " ".join(str(problem).split())  # the library's messages have several lines
            raise self.fault(f"{path}, at {place()} or behind it" if number else str(path), what, AGAIN) from problem

    def _refuse_missing_columns(self, path: Path, names: Sequence[str]) -> None:
        for leaf, name in self.record.members.items():
            if name not in names:
                what, fix = f"no column '{name}' among {', '.join(names)}", f"{_FIXES[leaf]}, or leave the file out"
                raise self.fault(str(path), what, fix, leaf)


def _plain_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch. Those before one that can't be decoded come all the same, so that it can be counted."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = (batch.slice(number, 1).to_pylist()[0] for number in range(batch.num_rows))
    yield from rows


class HuggingFace:
    """A data set of the Hugging Face `datasets` library, streamed; the document is the text in `field`.

    Its identity is its name: pin `revision`, so that the same recipe means the same data next year. That of a folder is its
    contents and the names of its files.
    """

    name = "hf"
    key = "data"

    def __init__(
        self,
        path: str | None,
        subset: str | None = None,
        split: str = "train",
        field: str = "text",
        revision: str | None = None,
        record: RecordText | None = None,
    ) -> None:
        self.path = path
        self.subset = subset
        self.split = split
        self.record = record or RecordText(field)
        self.revision = revision
        self._count = TextCount()

    def problems(self, key: str) -> list[Problem]:
        """Check that a data set is named, and that the library is there."""
        found = missing_extra("datasets", "hf", key, "data=hf")
        if not self.path:
            found.append(Problem(f"{key}.path", "no data set is named", "give owner/name, or a folder"))
        return found + self.record.problems(key)

    @property
    def masked(self) -> bool:
        """True if only a part of each document carries loss."""
        return self.record.masked

    @property
    def _read(self) -> str:
        """The columns that are read of a row, for the identity."""
        return self.record.settings if self.record.masked else self.record.field

    def identity(self, memo: Path) -> str:
        """Digest name, subset, split, revision and what is read of a row; of a folder its files and their names."""
        folder = Path(self.path or "")
        if self.path and folder.is_dir():  # the library prefers a folder to a name, too
            files = list(files_below(folder))
            names = [path.relative_to(folder).as_posix() for path in files]  # the library tells splits and subsets by them
            return identity_of(files, json.dumps(["hf", self.subset, self.split, self.revision, self._read, names]), memo)
        inputs = ["hf", self.path, self.subset, self.split, self.revision, self._read]
        return xxhash.xxh3_128_hexdigest(json.dumps(inputs).encode())

    def size(self) -> int | None:
        """Return None: unknown."""
        return None

    def documents(self) -> Iterator[str]:
        """Yield the documents as they stream in."""
        yield from self._count.nonempty(self._texts())
        self._count.warn(self.name, self.record, self.key)

    def _texts(self) -> Iterator[str]:
        """Yield the text of each row; "" where it has none."""
        library = import_extra("datasets", "hf", "data=hf")
        what = f"data set {self.path} ({self.split})"
        try:
            rows = library.load_dataset(self.path, self.subset, split=self.split, revision=self.revision, streaming=True)
        except Exception as problem:  # the library, the hub and the network raise many types
            fix = "check the name, the network and whether you may read it"
            raise SourceFault(f"{what} can't be opened: {problem} ({key_below(self.key, 'path')}); {fix}") from problem
        number = 0
        stream = iter(rows)
        while True:
            try:
                row = next(stream)
            except StopIteration:
                return
            except Exception as problem:  # rows are read from the network one by one
                place = f"behind row {number - 1}" if number else "at the first row"
                fix = "check the network, and start again"
                raise SourceFault(f"{what}, {place}: {problem} ({key_below(self.key, 'path')}); {fix}") from problem
            try:
                text = self.record.of(row)
            except ValueError as problem:
                raise _record_fault(f"{what}, row {number}", problem, self.record, self.key) from problem
            yield text
            number += 1
