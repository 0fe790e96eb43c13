"""Sources of documents: the interface of every source, and files of text."""

from __future__ import annotations

import ast
import codecs
import glob
import io
import logging
import os
import sysconfig
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from ...config.cache import expand_user
from ...config.problems import Problem
from ..version import NEWEST
from . import formats
from .identity import identity_of

log = logging.getLogger(__name__)

STDLIB_PARTS = ("source", "docs")
CHECKED = 32  # files whose first bytes are looked at before a run begins
AGAIN = "copy the file again, or leave it out"
"""Advice about a damaged file."""
_MARKS = {"JSON": "braces and names", "HTML": "tags", "XML": "tags", "a table": "separators"}


class DocumentSource(Protocol):
    """A stream of documents that can be read again and again, in the same order.

    key  the config node that describes it, as errors and warnings name it; "" where keys have no node
    """

    key: str

    @property
    def name(self) -> str:
        """Short word for file names and progress lines."""
        ...

    @property
    def masked(self) -> bool:
        """True if documents are `MarkedText`, of which only some tokens carry loss."""
        ...

    def problems(self, key: str) -> list[Problem]:
        """Return what is wrong with the settings, without reading documents. key: the config node's."""
        ...

    def documents(self) -> Iterator[str]:
        """Yield the documents, none of them empty. Raises ValueError naming the file and place that can't be read."""
        ...

    def identity(self, memo: Path) -> str:
        """Digest the contents: sources of the same identity give the same documents. memo: folder that caches digests."""
        ...

    def size(self) -> int | None:
        """Estimate the number of characters; None where that is not cheap to know."""
        ...


class FileSource(ABC):
    """Documents in files. Their order is that of the sorted paths; their identity that of their contents.

    input             a path, a glob pattern (`**` crosses folders), a folder, or several of them
    version           of the rules by which documents become samples (`version.py`)
    endings           of a folder, all files below it with these endings are read, except hidden ones; links are followed
    fallback_endings  read in a folder that has no file with `endings`, the first tuple of which it has some; beside others such
                      files are mostly metadata
    """

    name = "files"
    key = "data"
    masked = False
    endings: tuple[str, ...] = ("",)
    fallback_endings: tuple[tuple[str, ...], ...] = ()

    def __init__(self, input: str | Sequence[str] | None, version: int = NEWEST) -> None:
        self.version = version
        given: list[Any] = [] if input is None else [input] if isinstance(input, str | Mapping | int | float) else list(input)
        self.input = [each for each in given if isinstance(each, str)]
        self._no_paths = [each for each in given if not isinstance(each, str)]
        self._warned = False

    @abstractmethod
    def read(self, path: Path) -> Iterator[str]:
        """Yield the documents of one file."""

    def settings(self) -> str:
        """Name the settings that, beside the files' contents, decide the documents."""
        return self.name

    def fault(self, place: str, what: str, fix: str, leaf: str = "input") -> SourceFault:
        """Word what is wrong with a file or a record: its place, the key to look at, what to do.

        leaf: of the key, below the source's node
        """
        return SourceFault(f"{place}: {what} ({key_below(self.key, leaf)}); {fix}")

    def content(self, path: Path) -> Iterator[bytes]:
        """Yield the bytes of a file, decompressed. Raises ValueError, with key and fix, where it is damaged."""
        return self._undamaged(formats.blocks(path))

    def lines(self, path: Path) -> Iterator[bytes]:
        """Yield the lines of a file, decompressed. Raises ValueError, with key and fix, where it is damaged."""
        return self._undamaged(formats.lines(path))

    def _undamaged(self, parts: Iterator[bytes]) -> Iterator[bytes]:
        try:
            yield from parts
        except formats.DamagedFile as problem:
            raise self.fault(str(problem.path), problem.what, AGAIN) from problem

    def files(self) -> list[Path]:
        """List all files, sorted, each once even under several names. Raises OSError for a folder that can't be read."""
        found: dict[Path, Path] = {}
        for path in sorted({path for pattern in self.input for path in self._matches(pattern)}):
            found.setdefault(path.resolve(), path)
        return list(found.values())

    def _matches(self, pattern: str) -> Iterator[Path]:
        written = expand_user(pattern)
        if written.is_dir():
            yield from self._folder_files(written)[0]
            return
        for match in [written] if _is_file(written) else glob.iglob(str(written), recursive=True):  # noqa: PTH207 (a pattern may be absolute)
            if _is_file(Path(match)):
                yield Path(match)

    def _folder_files(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """List the files to read in a folder, and those with fallback endings that are skipped because of them."""
        below = [(path, path.name if self.version == 1 else path.name.lower()) for path in files_below(folder)]
        kinds = [[path for path, name in below if name.endswith(ends)] for ends in (self.endings, *self.fallback_endings)]
        first = next((number for number, kind in enumerate(kinds) if kind), 0)
        return kinds[first], sorted(path for kind in kinds[first + 1 :] for path in kind)

    def may_hold_data(self, path: Path) -> bool:
        """Return whether a file that is left out because of its name deserves a word."""
        return True

    def _warn_of_skipped_files(self) -> None:
        for folder in filter(Path.is_dir, map(expand_user, self.input)) if self.fallback_endings and not self._warned else ():
            taken, skipped = self._folder_files(folder)
            left = [path for path in skipped if self.may_hold_data(path)]
            if left:
                which = f"{left[0]} is" if len(left) == 1 else f"{left[0]} and {len(left) - 1} like it are"
                log.warning("%s not read as data beside files like %s; give them by name to have them read", which, taken[0])
        self._warned = True

    def problems(self, key: str) -> list[Problem]:
        """Check that every pattern matches a file, and the beginning of the first files."""
        found = self._pattern_problems(key)
        for path in [] if found else self._first_files():
            found = self.file_problems(key, path)
            if found:
                break  # files of one corpus are alike: one of them shows what is wrong
        return found

    def _first_files(self) -> list[Path]:
        """List the files that are looked at before a run begins. A broken link fails when the documents are read."""
        return [path for path in self.files()[:CHECKED] if path.exists()]

    def file_problems(self, key: str, path: Path) -> list[Problem]:
        """Return what the first bytes of a file show to be wrong."""
        foreign = formats.foreign_format(formats.head(path))
        if foreign is not None:
            return [Problem(f"{key}.input", f"'{path}' is {foreign[0]}", foreign[1])]
        if formats.compression(path) == "zstd" and (
            missing := formats.missing_extra("zstandard", "zstd", f"{key}.input", "reading .zst files")
        ):
            return missing
        wrong = formats.undecodable(path, formats.head(path))
        return [] if wrong is None else [Problem(f"{key}.input", f"'{path}' {wrong[0]}", wrong[1])]

    def _pattern_problems(self, key: str) -> list[Problem]:
        fix = "give a path, a glob pattern or a folder"
        if self._no_paths:
            return [Problem(f"{key}.input", f"{each} is no path", fix) for each in self._no_paths]
        if not self.input:
            return [Problem(f"{key}.input", "no file is named", fix)]
        return [
            Problem(f"{key}.input", *self._no_match(pattern))
            for pattern in self.input
            if not pattern.strip() or next(self._matches(pattern), None) is None  # an unset variable is not this folder
        ]

    def _no_match(self, pattern: str) -> tuple[str, str]:
        """Word the problem of a pattern without a file: (message, fix)."""
        if not pattern.strip():
            return f"'{pattern}' names no file", "give a path, a glob pattern or a folder"
        if expand_user(pattern).is_dir() and any(self.endings):
            endings = ", ".join([*self.endings, *(end for ends in self.fallback_endings for end in ends)])
            fix = f"for files with other names give a pattern, such as {pattern.rstrip('/')}/part-*"
            return f"'{pattern}' is a folder with no file that ends in {endings}", fix
        return f"'{pattern}' matches no file", "give a path, a glob pattern or a folder that has some"

    def documents(self) -> Iterator[str]:
        """Yield the documents of all files. Warns the first time of files that are skipped."""
        self._warn_of_skipped_files()
        for path in self.files():
            yield from self.read(path)

    def identity(self, memo: Path) -> str:
        """Digest all contents. What is read again, and when: as of `identity_of`."""
        return identity_of(self.files(), self.settings(), memo)

    def size(self) -> int | None:
        """Sum the bytes of all files; None where some are compressed."""
        files = self.files()
        return None if any(map(formats.compression, files)) else sum(path.stat().st_size for path in files)


class SourceFault(ValueError):
    """A file or a record that can't be read. The message names file, place and key, and says what to do."""


def key_below(node: str, leaf: str) -> str:
    """Return the key of a member of a config node."""
    return f"{node}.{leaf}" if node else leaf


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder but hidden ones, following links to folders. Raises OSError for one that can't be read."""

    def fail(error: OSError) -> None:
        raise error  # os.walk would skip the folder silently, and its documents with it

    entered: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        inside = os.path.realpath(place)
        folders[:] = [] if inside in entered else sorted(name for name in folders if not name.startswith("."))
        if inside not in entered:
            yield from (path for name in sorted(names) if not name.startswith(".") and _is_file(path := Path(place, name)))
        entered.add(inside)


def _is_file(path: Path) -> bool:
    """Return whether the path is a file or a broken link. Reading a broken link fails, which is better than skipping it."""
    return path.is_file() or (path.is_symlink() and not path.exists())


class TextFiles(FileSource):
    """Text files in UTF-8, plain or compressed: each is a document, or several, separated by `separator`.

    markup  files of JSON, HTML, XML or CSV are meant as text, with their markup
    """

    name = "text"

    def __init__(
        self,
        input: str | Sequence[str] | None,
        separator: str | None = None,
        version: int = NEWEST,
        markup: bool = False,
    ) -> None:
        super().__init__(input, version)
        self.separator = separator
        self._markup = markup
        self._separated = False  # whether the separator has occurred
        self._told = False

    def settings(self) -> str:
        """Name the settings that decide the documents: the separator, and how line ends are read."""
        return f"text {self.separator!r}" if self.version == 1 else f"text as it stands {self.separator!r}"

    def problems(self, key: str) -> list[Problem]:
        """Check the separator, that every pattern matches a file, and that the first files are text without markup."""
        found = super().problems(key)
        if self.separator == "":
            fix = f"give the text between documents, or {key or 'data'}.separator=null where each file is one"
            found.append(Problem(f"{key}.separator", "is empty, and separates nothing", fix))
        kinds = {} if found else self._markup_kinds()
        if kinds and None not in kinds:
            (what, fix), path = next((kind, path) for kind, path in kinds.items() if kind is not None)
            message = f"'{path}' holds {what}, which would be trained on with its {_MARKS[what]}"
            found.append(Problem(f"{key}.input", message, f"{fix}, or {key or 'data'}.markup=true if the markup is meant"))
        return found

    def _markup_kinds(self) -> dict[tuple[str, str] | None, Path]:
        """Return each kind of markup among the first files, None for none, and the first file of it."""
        if self._markup or self.version == 1:
            return {}
        kinds: dict[tuple[str, str] | None, Path] = {}
        for path in self._first_files():
            kinds.setdefault(formats.markup(formats.head(path)), path)
        return kinds

    def documents(self) -> Iterator[str]:
        """Yield the documents of all files. Warns of files with markup among others, and of a separator that occurs nowhere."""
        self._warn_of_markup()
        for path in self.files():
            yield from self.read(path)
        if self.separator and not self._separated and not self._warned:
            self._warned = True
            log.warning("%s", self._separator_notice())

    def _warn_of_markup(self) -> None:
        told, self._told = self._told, True
        for kind, path in self._markup_kinds().items() if not told else ():
            if kind is not None:
                key = key_below(self.key, "input")
                log.warning("%s: '%s' holds %s, and is trained on with its %s", key, path, kind[0], _MARKS[kind[0]])

    def _separator_notice(self) -> str:
        assert self.separator is not None
        key = key_below(self.key, "separator")
        said = f"{key}: {self.separator!r} occurs in no file of text, so that each file is a document"
        if "\\" in self.separator:
            return f"{said}; a backslash stands for itself: give a line break as such (in bash $'{key}=\"\\n\\n\"')"
        start = formats.head(self.files()[0])
        if b"\r\n" in start and "\r" not in self.separator:
            return f"{said}; lines of '{self.files()[0]}' end in \\r\\n"
        return said

    def read(self, path: Path) -> Iterator[str]:
        """Yield the documents of one file."""
        for number, document in enumerate(split_pieces(self._pieces(path), self.separator)):
            self._separated |= number > 0
            if document:
                yield document

    def _pieces(self, path: Path) -> Iterator[str]:
        """Yield the text of a file in pieces: as it stands, without a byte order mark, or by the rules of version 1."""
        decoder, newlines = codecs.getincrementaldecoder("utf-8")(), io.IncrementalNewlineDecoder(None, translate=True)
        done, mark = 0, "\ufeff"
        for block in chain(self.content(path), [b""]):
            held = len(decoder.getstate()[0])  # bytes of a character that a block has cut
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as problem:
                problem.start += done - held
                raise self.fault(str(path), *formats.not_utf8(path, problem)) from problem
            done += len(block)
            if self.version == 1:
                yield newlines.decode(text, final=not block)
            elif text:
                yield text.removeprefix(mark)
                mark = ""


def split_pieces(pieces: Iterable[str], separator: str | None) -> Iterator[str]:
    """Split a text that comes in pieces as `str.split` does. Of a file only a piece and the part that it ends in are in memory.

    separator: None or "" for a text that is not split
    """
    begun: list[str] = []  # of a part whose end has not been read
    rest = ""  # the end of what was read, which may be the beginning of a separator
    for piece in pieces:
        *ended, rest = (rest + piece).split(separator) if separator else [piece]
        for part in ended:
            yield "".join([*begun, part])
            begun = []
        certain = max(0, len(rest) + 1 - len(separator)) if separator else len(rest)
        begun.append(rest[:certain])
        rest = rest[certain:]
    yield "".join([*begun, rest])


class StandardLibrary(FileSource):
    """The source of the running interpreter's standard library: real text on every machine, tens of MB, no download.

    Installed packages are left out, and so are files that aren't UTF-8 (there are some among the library's own tests).
    """

    name = "stdlib"

    def __init__(self, part: str = "source") -> None:
        """part: source, the modules themselves, or docs, their docstrings."""
        super().__init__(sysconfig.get_path("stdlib"))
        self.part = part

    def settings(self) -> str:
        """Name the part that is read."""
        return self.name if self.part == "source" else f"{self.name} {self.part}"

    def files(self) -> list[Path]:
        """List all modules, in the order of their names."""
        root = Path(self.input[0])
        skipped = {"site-packages", "dist-packages"}
        return sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))

    def problems(self, key: str) -> list[Problem]:
        """Check that the source is there: some embedded interpreters come without it."""
        if self.part not in STDLIB_PARTS:
            return [Problem(f"{key}.part", f"there is no '{self.part}'", f"use {' or '.join(STDLIB_PARTS)}")]
        if next(Path(self.input[0]).glob("*.py"), None) is None:
            return [Problem(key, f"{self.input[0]} has no Python source", "use data=text with data.input=<folder>")]
        return []

    def read(self, path: Path) -> Iterator[str]:
        """Yield the module, or its docstrings, as one document."""
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return
        if self.part == "docs":
            text = "\n\n".join(_docstrings(text))
        if text:
            yield text


def _docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions; none of a file that does not parse (there are some)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in the library's own tests
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if text and not any("\ud800" <= letter <= "\udfff" for letter in text):  # no tokenizer takes these
                yield text
