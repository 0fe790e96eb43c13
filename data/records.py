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


def _extra(module: str, extra: str, purpose: str) -> Any:
    """An optional library. Raises ValueError saying how to install it."""
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
    perhaps = (".json.gz", ".json.zst")  # as C4 and Dolma name their documents; a plain .json is metadata

    def __init__(self, input: str | Sequence[str] | None, field: str = "text") -> None:
        super().__init__(input)
        self.field = field

    def settings(self) -> str:
        """The field decides the documents."""
        return f"jsonl {self.field!r}"

    def size(self) -> int | None:
        """Unknown where files are compressed."""
        files = self.files()
        return None if any(path.suffix in (".gz", ".zst") for path in files) else sum(path.stat().st_size for path in files)

    def problems(self, key: str) -> list[Problem]:
        """Files must match, and .zst needs a library."""
        found = super().problems(key)
        if not found and any(path.suffix == ".zst" for path in self.files()):
            found += _missing("zstandard", "zstd", f"{key}.input", "reading .zst files")
        return found

    def read(self, path: Path) -> Iterator[str]:
        """The documents of one file."""
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
    """The text in a record's field; a null is no text. Raises ValueError naming the fields that there are."""
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
    """The lines of a file, decompressed. Raises ValueError naming a file that is damaged or cut short."""
    damage: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if path.suffix == ".zst":
        library = _extra("zstandard", "zstd", f"reading {path}")
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
            raise  # it was not even opened, and says so
        raise ValueError(f"{path}: damaged behind line {number} ({problem})") from problem


def _opened_lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        yield from file


def _zstd_lines(path: Path, library: Any) -> Iterator[bytes]:
    """The library's own readers take a file that is cut short for a complete one: look for the end of the last frame."""
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
        """The column decides the documents."""
        return f"parquet {self.field!r}"

    def size(self) -> int | None:
        """Unknown: files are compressed."""
        return None

    def problems(self, key: str) -> list[Problem]:
        """Files must match, and the library must be there."""
        return [*super().problems(key), *_missing("pyarrow", "parquet", key, "data=parquet")]

    def read(self, path: Path) -> Iterator[str]:
        """The documents of one file."""
        parquet = _extra("pyarrow.parquet", "parquet", f"reading {path}")
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
        """A data set must be named, and the library must be there."""
        found = _missing("datasets", "hf", key, "data=hf")
        if not self.path:
            found.append(Problem(f"{key}.path", "no data set is named", "give owner/name, or a folder"))
        return found

    def identity(self, memo: Path) -> str:
        """Digest of name, subset, split, revision and field; of a folder's files and their names instead of its own."""
        folder = Path(self.path or "")
        if self.path and folder.is_dir():  # which the library prefers to a name, too
            files = list(files_below(folder))
            names = [path.relative_to(folder).as_posix() for path in files]  # by which the library tells splits and subsets
            return identity_of(files, json.dumps(["hf", self.subset, self.split, self.revision, self.field, names]), memo)
        asked = ["hf", self.path, self.subset, self.split, self.revision, self.field]
        return xxhash.xxh3_128_hexdigest(json.dumps(asked).encode())

    def size(self) -> int | None:
        """Unknown."""
        return None

    def documents(self) -> Iterator[str]:
        """The documents, as they stream in."""
        library = _extra("datasets", "hf", "data=hf")
        what = f"data set {self.path} ({self.split})"
        try:
            rows = library.load_dataset(self.path, self.subset, split=self.split, revision=self.revision, streaming=True)
        except Exception as problem:  # whatever the library, the hub or the network has to say
            raise ValueError(f"{what} can't be opened: {problem}") from problem
        number = 0
        stream = iter(rows)
        while True:
            try:
                row = next(stream)
            except StopIteration:
                return
            except Exception as problem:  # it is read from the network as it goes
                raise ValueError(f"{what}, behind row {number - 1}: {problem}") from problem
            try:
                text = field_text(row, self.field)
            except ValueError as problem:
                raise ValueError(f"{what}, row {number}: {problem}") from problem
            if text:
                yield text
            number += 1
