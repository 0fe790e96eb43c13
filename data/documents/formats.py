"""File formats, told by the first bytes of a file and never by its name; decompression of those that can be read."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import importlib
import io
import lzma
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from ...config.problems import Problem
from ..shards.manifest import named_error

HEAD = 1 << 16  # bytes, once decompressed, by which a file's content is judged
_BLOCK = 1 << 20

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_OPENERS: dict[str, Callable[[Path], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_FOREIGN = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3": "an SQLite database",
    b"%PDF-": "a PDF",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
_FIXES = {
    "a Parquet file": "use data=parquet",
    "text in UTF-16": "convert it to UTF-8: iconv -f UTF-16 -t UTF-8",
    "compressed by lz4": "compress it by gzip, bzip2, xz or zstd",
}
_UNPACK = "unpack or convert it first"
_RECORDS = "convert it to JSON lines and use data=jsonl"
_MARKUP = re.compile(rb"\s*(?:<!--.*?-->\s*)*<(?:(!doctype\s+html|html)|\?xml)\b", re.IGNORECASE | re.DOTALL)
_TABLE_ROWS, _TABLE_CELLS = 5, 10  # rows, and cells beyond the first column, that must agree before lines are a table
_STRING = rb'"(?:[^"\\]|\\.)*"\s*'
_JSON = re.compile(rb"\s*(?:(?:\[\s*)?\{\s*" + _STRING + rb":|\[\s*" + _STRING + rb"[,\]])")


class DamagedFile(ValueError):
    """Raised for a compressed file that is cut short or damaged. what: a few words, as far as it could be read"""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path = path
        self.what = what


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """Import an optional library. Raises ValueError saying how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise ValueError(f"{purpose} needs {module}; install it with: pip install 'meshloom[{extra}]'") from problem


def missing_extra(module: str, extra: str, key: str, purpose: str) -> list[Problem]:
    """Return the problem of an optional library that is not installed, if it is not."""
    if find_spec(module) is not None:
        return []
    return [Problem(key, f"{purpose} needs {module}, which is not installed", f"pip install 'meshloom[{extra}]'", lacks=module)]


def compression(path: Path) -> str | None:
    """Return by what a file is compressed: gzip, bzip2, xz, zstd; None for a plain one."""
    with path.open("rb") as file:
        start = file.read(8)
    return next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), None)


def blocks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed. Raises DamagedFile, naming it; ValueError without the library for zstd."""
    kind = compression(path)
    damage: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
    if kind == "zstd":
        library = import_extra("zstandard", "zstd", f"reading {path}")
        damage = (*damage, library.ZstdError)
        found = _zstd_blocks(path, library)
    else:
        found = _opened_blocks(path, kind)
    try:
        yield from found
    except damage as problem:
        if isinstance(problem, OSError) and (kind is None or problem.errno is not None):  # the file system's, and no damage
            raise named_error(problem, path) from problem
        raise DamagedFile(path, f"damaged ({problem})") from problem


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed, without their line feed. Raises DamagedFile, naming file and line."""
    begun: list[bytes] = []  # parts of a line whose end has not been read
    number = 0
    try:
        for block in blocks(path):
            *ended, rest = block.split(b"\n")
            for part in ended:
                yield b"".join([*begun, part])
                begun, number = [], number + 1
            begun.append(rest)
    except DamagedFile as problem:
        raise DamagedFile(path, f"damaged behind line {number} ({problem.__cause__})") from problem
    if last := b"".join(begun):
        yield last


def head(path: Path) -> bytes:
    """Return the first bytes of a file, decompressed, as far as they can be read: `HEAD` of them, or all."""
    found = b""
    try:
        for block in blocks(path):
            found += block
            if len(found) >= HEAD:
                break
    except ValueError:  # damage and missing libraries are reported where the whole file is read
        pass
    return found


def foreign_format(start: bytes) -> tuple[str, str] | None:
    """Tell from a file's first bytes that it is neither text nor compressed text: (what it is, what to do). None: it may be."""
    name = next((name for magic, name in _FOREIGN.items() if start.startswith(magic)), None)
    if start[257:262] == b"ustar":  # of the first member's header
        name = "a tar archive"
    return None if name is None else (name, _FIXES.get(name, _UNPACK))


def undecodable(path: Path, start: bytes) -> tuple[str, str] | None:
    """Tell that a file's first bytes are no text in UTF-8: (what is wrong, what to do). None: they are."""
    if start.count(0) * 10 > len(start):  # of UTF-16 without a mark every second byte is 0, in most scripts
        return "holds zero bytes, as UTF-16 without a mark or binary data do", _FIXES["text in UTF-16"]
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start, final=len(start) < HEAD)  # else a character may be cut
    except UnicodeDecodeError as problem:
        what, fix = not_utf8(path, problem)
        return f"is {what}", fix
    return None


def not_utf8(path: Path, problem: UnicodeDecodeError) -> tuple[str, str]:
    """Word that a file is not UTF-8: (what is wrong, what to do)."""
    fix = f"convert it; if it is Latin-1: iconv -f LATIN1 -t UTF-8 {shlex.quote(path.name)}"
    return f"not UTF-8 text ({problem.reason} at byte {problem.start})", fix


def markup(start: bytes) -> tuple[str, str] | None:
    """Tell that a file that begins so is text with markup: (JSON, HTML, XML or a table; what to do). None: it is plain.

    JSON is objects, one a line or not, or an array of objects or strings. A table has a separator as often in every line.
    """
    start = start.removeprefix(codecs.BOM_UTF8)
    if _JSON.match(start):
        return "JSON", "use data=jsonl"
    if found := _MARKUP.match(start):
        return ("HTML" if found[1] else "XML"), "extract its text first"
    return ("a table", _RECORDS) if _is_table(start) else None


def _is_table(start: bytes) -> bool:
    """Return whether the first lines are the rows of a CSV or TSV file. Quoted cells may hold line breaks."""
    text = start.decode(errors="ignore")
    for separator in "\t,;":
        if separator not in text[:4096]:
            continue
        try:
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row][:32]
        except csv.Error:
            continue
        whole = rows[:-1] if len(rows) > 1 else rows  # the last one may be cut
        columns = {len(row) for row in whole}
        cells = (columns.pop() - 1) * len(whole) if len(columns) == 1 else 0
        if len(whole) >= _TABLE_ROWS and cells >= _TABLE_CELLS:
            return True
    return False


def _opened_blocks(path: Path, kind: str | None) -> Iterator[bytes]:
    file: BinaryIO
    with path.open("rb") if kind is None else _OPENERS[kind](path) as file:
        while block := file.read(_BLOCK):
            yield block


def _zstd_blocks(path: Path, library: Any) -> Iterator[bytes]:
    """Yield the blocks of a .zst file. Raises EOFError without the last frame's end, which the library does not check."""
    frame: Any = None
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            while block:
                if frame is None or frame.eof:
                    frame = library.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data
    if frame is not None and not frame.eof:
        raise EOFError("the compressed stream is cut short")
