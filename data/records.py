"""Documents in records: JSON lines, parquet, and Hugging Face `datasets`."""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import xxhash

from ..config.problems import Problem
from .sources import FileSource, files_below, identity_of


def _import_extra(module: str, extra: str, purpose: str) -> Any:
    """Import an optional library. Raises ValueError saying how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise ValueError(f"{purpose} needs {module}; install it with: pip install 'meshloom[{extra}]'") from problem


def _missing(module: str, extra: str, key: str, purpose: str) -> list[Problem]:
    if find_spec(module) is not None:
        return []
    return [Problem(key, f"{purpose} needs {module}, which is not installed", f"pip install 'meshloom[{extra}]'")]


class JsonLines(FileSource):
    """Files with a JSON object per line, plain or compressed (.gz, .zst); the document is the text in `field`."""

    name = "jsonl"
    endings = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")
    fallback_endings = (".json.gz", ".json.zst")  # as C4 and Dolma name their documents; a bare .json is metadata

    def __init__(self, input: str | Sequence[str] | None, field: str = "text") -> None:
        super().__init__(input)
        self.field = field

    def settings(self) -> str:
        """Name the settings that decide the documents: the field."""
        return f"jsonl {self.field!r}"

    def size(self) -> int | None:
        """Sum the bytes of all files; None where some are compressed."""
        files = self.files()
        return None if any(path.suffix in (".gz", ".zst") for path in files) else sum(path.stat().st_size for path in files)

    def problems(self, key: str) -> list[Problem]:
        """Check that files match, and that the library for .zst is there."""
        found = super().problems(key)
        if not found and any(path.suffix == ".zst" for path in self.files()):
            found += _missing("zstandard", "zstd", f"{key}.input", "reading .zst files")
        return found

    def read(self, path: Path) -> Iterator[str]:
        """Yield the documents of one file."""
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            try:
                text = self._text(json.loads(line))
            except (ValueError, RecursionError) as problem:
                raise ValueError(f"{path}, line {number}: {problem}") from problem
            if text:
                yield text

    def _text(self, record: Any) -> str:
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        return field_text(record, self.field)


def field_text(record: dict[str, Any], field: str) -> str:
    """Return the text in a record's field; "" for a null. Raises ValueError naming the fields that there are."""
    if field not in record:
        raise ValueError(f"no field '{field}' (data.field) among {', '.join(record) or 'none'}")
    text = record[field]
    if not isinstance(text, str | None):
        raise ValueError(f"field '{field}' (data.field) is not text but {type(text).__name__}")
    text = text or ""
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which no tokenizer takes
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed. Raises ValueError naming a file that is damaged or cut short."""
    damage: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if path.suffix == ".zst":
        library = _import_extra("zstandard", "zstd", f"reading {path}")
        lines = _zstd_lines(path, library)
        damage = (*damage, library.ZstdError)
    else:
        lines = _opened_lines(path)
    number = 0
    try:
        for line in lines:
            yield line
            number += 1
    except damage as problem:
        if isinstance(problem, OSError) and problem.filename is not None:
            raise  # opening it failed, and the error names the file
        raise ValueError(f"{path}: damaged behind line {number} ({problem})") from problem


def _opened_lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        yield from file


def _zstd_lines(path: Path, library: Any) -> Iterator[bytes]:
    """Yield the lines of a .zst file. Raises EOFError without the last frame's end, which the library does not check."""
    frame: Any = None
    rest = b""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            while block:
                if frame is None or frame.eof:
                    frame = library.ZstdDecompressor().decompressobj()
                *lines, rest = (rest + frame.decompress(block)).split(b"\n")
                yield from lines
                block = frame.unused_data
    if rest:
        yield rest
    if frame is not None and not frame.eof:
        raise EOFError("the compressed stream is cut short")


class ParquetFiles(FileSource):
    """Parquet files; the document is the text in the column `field`."""

    name = "parquet"
    endings = (".parquet",)

    def __init__(self, input: str | Sequence[str] | None, field: str = "text") -> None:
        super().__init__(input)
        self.field = field

    def settings(self) -> str:
        """Name the settings that decide the documents: the column."""
        return f"parquet {self.field!r}"

    def size(self) -> int | None:
        """Return None: files are compressed."""
        return None

    def problems(self, key: str) -> list[Problem]:
        """Check that files match, and that the library is there."""
        return [*super().problems(key), *_missing("pyarrow", "parquet", key, "data=parquet")]

    def read(self, path: Path) -> Iterator[str]:
        """Yield the documents of one file."""
        parquet = _import_extra("pyarrow.parquet", "parquet", f"reading {path}")
        try:
            with parquet.ParquetFile(path) as file:
                names: list[str] = file.schema_arrow.names
                if self.field not in names:
                    raise ValueError(f"no column '{self.field}' (data.field) among {', '.join(names)}")
                for batch in file.iter_batches(batch_size=1024, columns=[self.field]):
                    for text in batch.column(0).to_pylist():
                        if text := field_text({self.field: text}, self.field):
                            yield text
        except (ValueError, OSError) as problem:  # the library's own errors derive from these two
            raise ValueError(f"{path}: {problem}") from problem


class HuggingFace:
    """A data set of the Hugging Face `datasets` library, streamed; the document is the text in `field`.

    Its identity is its name: pin `revision`, so that the same recipe means the same data next year. That of a folder is its
    contents and the names of its files.
    """

    name = "hf"

    def __init__(
        self,
        path: str | None,
        subset: str | None = None,
        split: str = "train",
        field: str = "text",
        revision: str | None = None,
    ) -> None:
        self.path = path
        self.subset = subset
        self.split = split
        self.field = field
        self.revision = revision

    def problems(self, key: str) -> list[Problem]:
        """Check that a data set is named, and that the library is there."""
        found = _missing("datasets", "hf", key, "data=hf")
        if not self.path:
            found.append(Problem(f"{key}.path", "no data set is named", "give owner/name, or a folder"))
        return found

    def identity(self, memo: Path) -> str:
        """Digest name, subset, split, revision and field; of a folder its files and their names in place of its name."""
        folder = Path(self.path or "")
        if self.path and folder.is_dir():  # the library prefers a folder to a name, too
            files = list(files_below(folder))
            names = [path.relative_to(folder).as_posix() for path in files]  # the library tells splits and subsets by them
            return identity_of(files, json.dumps(["hf", self.subset, self.split, self.revision, self.field, names]), memo)
        inputs = ["hf", self.path, self.subset, self.split, self.revision, self.field]
        return xxhash.xxh3_128_hexdigest(json.dumps(inputs).encode())

    def size(self) -> int | None:
        """Return None: unknown."""
        return None

    def documents(self) -> Iterator[str]:
        """Yield the documents as they stream in."""
        library = _import_extra("datasets", "hf", "data=hf")
        what = f"data set {self.path} ({self.split})"
        try:
            rows = library.load_dataset(self.path, self.subset, split=self.split, revision=self.revision, streaming=True)
        except Exception as problem:  # the library, the hub and the network raise many types
            raise ValueError(f"{what} can't be opened: {problem}") from problem
        number = 0
        stream = iter(rows)
        while True:
            try:
                row = next(stream)
            except StopIteration:
                return
            except Exception as problem:  # rows are read from the network one by one
                raise ValueError(f"{what}, behind row {number - 1}: {problem}") from problem
            try:
                text = field_text(row, self.field)
            except ValueError as problem:
                raise ValueError(f"{what}, row {number}: {problem}") from problem
            if text:
                yield text
            number += 1
