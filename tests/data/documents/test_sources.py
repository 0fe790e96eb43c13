"""Document sources: every kind gives the documents that were put in, and names the place that can't be read."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from meshloom.data.documents import identity
from meshloom.data.documents.chat import ChatTemplate
from meshloom.data.documents.record_text import RecordText
from meshloom.data.documents.records import HuggingFace, JsonLines, ParquetFiles
from meshloom.data.documents.sources import FileSource, StandardLibrary, TextFiles

TEXTS = ["first", "zweites Dokument: Füße", "third\nwith two lines"]


def write_lines(path: Path, texts: list[Any], field: str = "text") -> Path:
    lines = "".join(json.dumps({"id": number, field: text}) + "\n" for number, text in enumerate(texts)) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines(tmp_path: Path, name: str):
    path = write_lines(tmp_path / name, [*TEXTS, "", None])
    source = JsonLines(str(path))
    assert source.problems("data") == []
    assert list(source.documents()) == list(source.documents()) == TEXTS
    assert (source.size() is None) == (path.suffix != ".jsonl")


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud83d y \\ud83d\\ude00"}\n')
    assert list(JsonLines(str(tmp_path)).documents()) == ["x� y 😀"]


def test_zstd_frames_one_behind_the_other(tmp_path: Path):
    """Join them as `cat a.zst b.zst` does; a frame may end within a line."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress(lines[at : at + 25]) for at in range(0, len(lines), 25)))
    assert list(JsonLines(str(tmp_path)).documents()) == TEXTS


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "ok"', r"a\.jsonl, line 2: .*delimiter"),
        ("[1]", r"line 2: not a JSON object"),
        ('{"body": "x", "id": 1}', r"line 2: no field 'text' among body, id \(data\.field\)"),
        ("[" * 100_000, r"a\.jsonl, line 2: "),
        ('{"text": 3}', r"line 2: field 'text' is not text but int \(data\.field\)"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, line: str, said: str):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=said):
        list(JsonLines(str(tmp_path)).documents())


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("fault", ["cut", "flipped"])
def test_damaged_archives_are_named(tmp_path: Path, name: str, fault: str):
    path = write_lines(tmp_path / name, [f"document {number} of many" for number in range(500)])
    content = bytearray(path.read_bytes())
    if fault == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[3] ^= 255
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}(: damaged behind line \d+|, line \d+)"):
        list(JsonLines(str(path)).documents())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_that_is_gone_is_not_called_damaged(tmp_path: Path, name: str):
    with pytest.raises(FileNotFoundError, match=name):
        list(JsonLines(str(tmp_path)).read(tmp_path / name))


def test_parquet(tmp_path: Path):
    table = pa.table({"id": [1, 2, 3, 4, 5], "body": [*TEXTS, "", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = ParquetFiles(str(tmp_path), field="body")
    assert source.problems("data") == []
    assert list(source.documents()) == TEXTS
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text' among id, body \(data\.field\)"):
        list(ParquetFiles(str(tmp_path)).documents())
    with pytest.raises(ValueError, match=r"field 'id' is not text but int \(data\.field\)"):
        list(ParquetFiles(str(tmp_path), field="id").documents())
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"a\.parquet"):
        list(ParquetFiles(str(tmp_path), field="body").documents())


def test_text_folder_pattern_file_and_list(tmp_path: Path):
    for name, text in {
        "b.txt": "2",
        "a.txt": "1",
        "c.md": "3",
        "sub/d.txt": "4",
        ".hidden/e.txt": "5",
        "empty.txt": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert "".join(TextFiles(str(tmp_path)).documents()) == "1234"
    assert "".join(TextFiles(f"{tmp_path}/**/*.txt").documents()) == "124"
    assert "".join(TextFiles([f"{tmp_path}/c.md", f"{tmp_path}/a.txt", f"{tmp_path}/*.md"]).documents()) == "13"
    problems = TextFiles([f"{tmp_path}/a.txt", f"{tmp_path}/*.rst"]).problems("data")
    assert [problem.key for problem in problems] == ["data.input"] and "*.rst' matches no file" in str(problems[0])
    assert "no file is named" in str(TextFiles(None).problems("data")[0])


def test_a_file_with_several_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "b.txt").write_text("2")
    (tmp_path / "latest.txt").symlink_to("b.txt")
    monkeypatch.chdir(tmp_path)
    assert list(TextFiles(["a.txt", str(tmp_path / "a.txt"), str(tmp_path)]).documents()) == ["1", "2"]


def test_nothing_below_a_folder_is_left_out_in_silence(tmp_path: Path):
    data, disk = tmp_path / "data", tmp_path / "disk"
    for folder in (data, disk):
        folder.mkdir()
    (data / "a.txt").write_text("1")
    (disk / "b.txt").write_text("2")
    (data / "more").symlink_to(disk)
    (disk / "round").symlink_to(data)  # and about
    assert list(TextFiles(str(data)).documents()) == ["1", "2"]
    (data / "c.txt").symlink_to(tmp_path / "unmounted" / "c.txt")
    for given in (str(data), f"{data}/*.txt", str(data / "c.txt")):
        source = TextFiles(given)
        assert source.problems("data") == []
        with pytest.raises(FileNotFoundError, match=r"c\.txt"):
            source.identity(tmp_path / "memo")
        with pytest.raises(FileNotFoundError, match=r"c\.txt"):
            list(source.documents())


def test_a_folder_that_may_not_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.txt").write_text("1")
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        TextFiles(str(tmp_path)).files()


@pytest.mark.parametrize("given", ["", ["", "a.txt"], [" "]])
def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("1")
    (problem,) = TextFiles(given).problems("data")
    assert problem.key == "data.input" and "names no file" in problem.message


def test_somebody_without_a_home_has_no_files(tmp_path: Path):
    assert "matches no file" in str(TextFiles("~nobody-of-this-name/a.txt").problems("data")[0])


@pytest.mark.parametrize("name", ["a.ndjson.gz", "a.ndjson.zst", "a.json.gz", "a.json.zst"])
def test_a_folder_of_compressed_json_with_fallback_endings(tmp_path: Path, name: str):
    write_lines(tmp_path / name, TEXTS)
    (tmp_path / "statistics.json").write_text("{}")
    assert list(JsonLines(str(tmp_path)).documents()) == TEXTS


@pytest.mark.parametrize("metadata", ["dataset_info.json.gz", "meta/state.json.zst", "statistics.json", "README.md"])
def test_files_beside_json_lines_are_not_read_as_data(tmp_path: Path, metadata: str, caplog: pytest.LogCaptureFixture):
    write_lines(tmp_path / "a.jsonl.gz", TEXTS)
    (tmp_path / metadata).parent.mkdir(exist_ok=True)
    (tmp_path / metadata).write_bytes(b"not even compressed")
    source = JsonLines(str(tmp_path))
    with caplog.at_level("WARNING"):
        assert source.problems("data") == []
        assert list(source.documents()) == list(source.documents()) == TEXTS
    doubtful = Path(metadata).suffix in (".gz", ".zst")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == doubtful and all(metadata in line and str(tmp_path) in line for line in said)


def test_a_folder_of_other_names_says_which_are_looked_for(tmp_path: Path):
    write_lines(tmp_path / "train-00000", TEXTS)
    (problem,) = JsonLines(f"{tmp_path}/").problems("data")
    assert "is a folder with no file that ends in .jsonl, " in problem.message and problem.message.endswith(".json.xz, .json")
    assert problem.fix.endswith(f"such as {tmp_path}/part-*")
    assert list(JsonLines(f"{tmp_path}/train-*").documents()) == TEXTS


RECORDS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
WRITTEN = {
    "lines": "".join(json.dumps(record) + "\n" for record in RECORDS),
    "lines with a mark": "\ufeff" + "".join(json.dumps(record) + "\n" for record in RECORDS),
    "array": json.dumps(RECORDS),
    "array over lines": json.dumps(RECORDS, indent=1),
    "array, a record a line": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "objects over lines": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
    "objects in one line": "".join(map(json.dumps, RECORDS[:1])),
}
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("layout", WRITTEN)
def test_json_is_told_by_its_content(tmp_path: Path, layout: str):
    expected = TEXTS[:1] if layout == "objects in one line" else TEXTS
    for name in ("a.json", "A.JSONL", "a.jsonl.gz"):
        (tmp_path / name).write_text(WRITTEN[layout])  # the last one is not compressed, whatever its name says
        assert JsonLines(str(tmp_path)).problems("data") == []
        assert list(JsonLines(str(tmp_path)).documents()) == expected
        (tmp_path / name).unlink()


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", ["a", "a.txt"])
def test_compressed_files_are_told_by_their_content(tmp_path: Path, ending: str, name: str):
    (tmp_path / "text").mkdir()
    (tmp_path / f"text/{name}{ending}").write_bytes(PACK[ending]("\n\n".join(TEXTS).encode()))
    assert list(TextFiles(str(tmp_path / "text"), separator="\n\n").documents()) == TEXTS
    (tmp_path / f"{name}.records{ending}").write_bytes(PACK[ending](WRITTEN["array"].encode()))
    assert list(JsonLines(f"{tmp_path}/{name}.records{ending}").documents()) == TEXTS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PAR1....", "is a Parquet file; use data=parquet"),
        (b"PK\x03\x04....", "is a zip archive; unpack"),
        (gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar\x0000"), "is a tar archive; unpack"),
        ("über".encode("utf-16"), "is text in UTF-16; convert it to UTF-8"),
    ],
    ids=["parquet", "zip", "tar", "utf-16"],
)
@pytest.mark.parametrize("kind", [TextFiles, JsonLines])
def test_other_formats_are_named_before_the_run(tmp_path: Path, kind: type[FileSource], content: bytes, said: str):
    (tmp_path / "a.jsonl").write_bytes(content)
    (problem,) = kind(str(tmp_path)).problems("data")  # type: ignore[call-arg]
    assert problem.key == "data.input" and said in str(problem) and "a.jsonl" in str(problem)


@pytest.mark.parametrize("layout", WRITTEN)
def test_json_is_no_text_unless_it_is_said_to_be(tmp_path: Path, layout: str):
    (tmp_path / "a.txt").write_text(WRITTEN[layout])
    (problem,) = TextFiles(str(tmp_path)).problems("data")
    assert problem.key == "data.input" and "data=jsonl" in problem.fix and "data.markup=true" in problem.fix
    assert TextFiles(str(tmp_path), markup=True).problems("data") == []
    assert TextFiles(str(tmp_path), version=1).problems("data") == []  # as runs have begun
    (tmp_path / "b.py").write_text("x = {'a': 1}\n")  # a program with its settings
    assert TextFiles(str(tmp_path)).problems("data") == []


MARKED = {
    "HTML": "<!-- saved -->\n<!DOCTYPE html>\n<html><p>text</p></html>",
    "XML": "\ufeff<?xml version='1.0'?>\n<a>text</a>",
    "a table": "id,text\n" + "".join(f'{row},"a line,\nand more"\n' for row in range(12)),
}


@pytest.mark.parametrize("kind", MARKED)
def test_markup_is_no_text_unless_it_is_said_to_be(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture):
    (tmp_path / "a.txt").write_text(MARKED[kind])
    (problem,) = TextFiles(str(tmp_path)).problems("data")
    assert problem.key == "data.input" and f"a.txt' holds {kind}" in str(problem) and "data.markup=true" in problem.fix
    assert TextFiles(str(tmp_path), markup=True).problems("data") == []
    (tmp_path / "b.txt").write_text("plain")
    source = TextFiles(str(tmp_path))
    assert source.problems("data") == [] and len(list(source.documents())) == len(list(source.documents())) == 2
    (record,) = caplog.records
    assert f"a.txt' holds {kind}, and is trained on" in record.getMessage()


@pytest.mark.parametrize(
    "text",
    [
        "one, two, three, four, five, six, seven, eight, nine, ten, eleven\n",  # of one line
        "roses, red\nviolets, blue\nsugar is sweet\n" * 20,
        "x < html and <p>\n",
        "".join(f"    f({n}, {n}, [{n}])\n" for n in range(4)) + "    g()\n" + "    h(1, 2, 3)\n" * 9,
    ],
)
def test_text_with_commas_and_angles_has_no_markup(tmp_path: Path, text: str):
    (tmp_path / "a.txt").write_text(text)
    assert TextFiles(str(tmp_path)).problems("data") == []


@pytest.mark.parametrize("kind", [TextFiles, JsonLines])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "Füße"}\n'.encode("latin-1"), r"is not UTF-8 text \(.* at byte 11\); .*iconv -f LATIN1 -t UTF-8 'a b.txt'"),
        ('{"text": "Feet"}\n'.encode("utf-16-le"), "zero bytes, as UTF-16 without a mark"),
    ],
)
def test_another_encoding_is_told_with_a_fix(tmp_path: Path, kind: type[FileSource], content: bytes, said: str):
    (tmp_path / "a b.txt").write_bytes(content)
    (problem,) = kind(f"{tmp_path}/a b.txt").problems("data")  # type: ignore[call-arg]
    assert problem.key == "data.input" and re.search(said, str(problem))
    if "byte 11" in said:  # and where only a later part of the file shows it
        with pytest.raises(ValueError, match=r"not UTF-8 text .*iconv"):
            list(kind(f"{tmp_path}/a b.txt").documents())  # type: ignore[call-arg]


def test_a_character_cut_at_the_end_of_what_is_looked_at_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("meshloom.data.documents.formats.HEAD", 3)
    monkeypatch.setattr("meshloom.data.documents.formats._BLOCK", 3)
    (tmp_path / "a.txt").write_text("xxü")
    assert TextFiles(str(tmp_path)).problems("data") == []


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_records_without_a_text_are_counted(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture):
    texts = [*TEXTS, None, "", None]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_lines(path, texts)
    else:
        pyarrow.parquet.write_table(pa.table({"text": texts}), path)
    source = {"jsonl": JsonLines, "parquet": ParquetFiles}[kind](str(path))
    assert list(source.documents()) == list(source.documents()) == TEXTS
    (record,) = caplog.records
    assert f"data.field: 3 of 6 records (50.0%) of data={kind} have no text in 'text'" in record.getMessage()


def test_an_empty_separator_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one two")
    (problem,) = TextFiles(str(tmp_path), separator="").problems("data")
    assert problem.key == "data.separator" and "data.separator=null" in problem.fix


@pytest.mark.parametrize("text", ["[1] Knuth", "{x} is a set", '"Hello", she said', "{\\rtf1", "[links]: #a\n"])
def test_text_with_brackets_is_no_json(tmp_path: Path, text: str):
    (tmp_path / "a.txt").write_text(text)
    assert TextFiles(str(tmp_path)).problems("data") == []


@pytest.mark.parametrize("layout", WRITTEN)
def test_a_missing_field_is_found_before_the_run(tmp_path: Path, layout: str):
    (tmp_path / "a.json").write_text(WRITTEN[layout])
    (problem,) = JsonLines(str(tmp_path), field="body").problems("data.sources.web")
    assert problem.key == "data.sources.web.field"
    assert "a.json' has no field 'body'" in problem.message and "among id, text" in problem.message
    pyarrow.parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    (problem,) = ParquetFiles(str(tmp_path), field="body").problems("data")
    assert problem.key == "data.field" and "has no column 'body' among text" in problem.message


@pytest.mark.parametrize(("key", "names"), [("prompt", {"prompt": "body"}), ("messages", {"messages": "body"})])
def test_a_missing_member_is_refused_by_its_own_key(tmp_path: Path, key: str, names: dict[str, str]):
    record = RecordText("text", **names, template=ChatTemplate("{% generation %}{% endgeneration %}", {}))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    pyarrow.parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    for source in (JsonLines(str(tmp_path), record=record), ParquetFiles(str(tmp_path), record=record)):
        (problem,) = source.file_problems("data", tmp_path / f"a{source.endings[0]}")
        assert problem.key == f"data.{key}" and "'body'" in problem.message
        with pytest.raises(ValueError, match=rf"no (field|column) 'body' among text \(data\.{key}\)"):
            list(source.documents())


def test_a_damaged_array_is_named(tmp_path: Path):
    (tmp_path / "a.json").write_text(WRITTEN["array over lines"][:-4])
    with pytest.raises(ValueError, match=r"a\.json, line \d\d: "):
        list(JsonLines(str(tmp_path)).documents())
    (tmp_path / "a.json").write_text('[{"text": "x"}, 3]')
    with pytest.raises(ValueError, match=r"a\.json, record 2: not a JSON object"):
        list(JsonLines(str(tmp_path)).documents())


def test_json_beside_json_lines_gets_a_word_if_it_may_be_data(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "more.json").write_text(WRITTEN["array"])
    (tmp_path / "info.json").write_text('{"rows": 3}')
    assert list(JsonLines(str(tmp_path)).documents()) == TEXTS
    (record,) = caplog.records
    assert "more.json is not read as data" in record.getMessage()


def test_text_is_read_as_it_stands(tmp_path: Path):
    """Line ends of all three kinds, and the byte order mark that editors write."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\rthree\n\xef\xbb\xbffour")
    assert list(TextFiles(str(tmp_path)).documents()) == ["one\r\n\r\ntwo\rthree\n\ufefffour"]
    assert list(TextFiles(str(tmp_path), "\r\n\r\n").documents()) == ["one", "two\rthree\n\ufefffour"]
    assert list(TextFiles(str(tmp_path), version=1).documents()) == ["\ufeffone\n\ntwo\nthree\n\ufefffour"]
    identities = {TextFiles(str(tmp_path), version=version).identity(tmp_path / ".memo") for version in (1, 2)}
    assert len(identities) == 2


@pytest.mark.parametrize(
    ("separator", "said"),
    [("\n\n\n", "lines of .*a.txt' end in"), (r"\r\n\r\n", r"a backslash stands for itself"), ("§", "each file")],
)
def test_a_separator_that_occurs_nowhere_gets_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, separator: str, said: str
):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\n\r\ntwo")
    source = TextFiles(str(tmp_path), separator)
    assert len(list(source.documents())) == len(list(source.documents())) == 1
    (record,) = caplog.records
    assert re.search(f"data.separator: .* occurs in no file.*{said}", record.getMessage())
    caplog.clear()
    assert list(TextFiles(str(tmp_path), "two").documents()) == ["one\r\n\r\n\r\n"] and not caplog.records


def test_doubtful_names_are_read_where_they_are_given(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", ["1"])
    write_lines(tmp_path / "b.json.gz", ["2"])
    assert list(JsonLines([str(tmp_path), f"{tmp_path}/*.json.gz"]).documents()) == ["1", "2"]


def test_text_separator_and_encoding(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\n\nthree")
    assert list(TextFiles(str(tmp_path), separator="\n\n").documents()) == ["one", "two", "three"]
    (tmp_path / "a.txt").write_bytes("Füße".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 text .* at byte 1"):
        list(TextFiles(str(tmp_path)).documents())


def test_standard_library():
    source = StandardLibrary()
    files = source.files()
    assert source.problems("data") == []
    assert {"argparse.py", "typing.py", "dataclasses.py"} <= {path.name for path in files}
    assert not any(part in ("site-packages", "dist-packages") for path in files for part in path.parts)
    assert files == sorted(files) and len(files) == len(set(files))
    assert next(source.documents()) == next(text for path in files if (text := path.read_text()))


def test_standard_library_passes_over_what_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "good.py").write_text("x = 1")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xfc\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/other.py").write_text("y = 2")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert list(StandardLibrary().documents()) == ["x = 1"]
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "none"))
    assert "use data=text" in str(StandardLibrary().problems("data")[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: TextFiles(folder),
        lambda folder: TextFiles(folder, separator="\n"),
        lambda folder: JsonLines(folder),
        lambda folder: JsonLines(folder, field="body"),
    ],
)
def test_identity_is_that_of_contents_and_settings(tmp_path: Path, make: Callable[[str], FileSource]):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "a.jsonl", TEXTS)
    memo = tmp_path / "memo"
    first, second = (make(str(tmp_path / folder)) for folder in ("one", "two"))
    assert first.identity(memo) == second.identity(memo) == first.identity(memo)
    write_lines(tmp_path / "two/a.jsonl", [*TEXTS, "more"])
    assert first.identity(memo) != second.identity(memo)
    others = [TextFiles(str(tmp_path / "one"), separator="."), ParquetFiles(str(tmp_path / "one/a.jsonl"))]
    assert first.identity(memo) not in [other.identity(memo) for other in others]


def test_identity_reads_unchanged_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    identity = JsonLines(str(tmp_path)).identity(tmp_path / ".memo")
    monkeypatch.setattr("meshloom.data.documents.identity.digest_file", None)
    assert JsonLines(str(tmp_path)).identity(tmp_path / ".memo") == identity


def test_a_large_file_is_hashed_once_whatever_comes_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(identity, "LARGE", 10)
    digest_file, read = identity.digest_file, list[str]()
    monkeypatch.setattr(identity, "digest_file", lambda path, count: (read.append(path.name), digest_file(path, count))[1])
    memo, text = tmp_path / "memo", tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("long enough")
    (text / "b.txt").write_text("short")
    before = TextFiles(str(text)).identity(memo)
    assert TextFiles(str(text), separator=".").identity(memo) != before and read == ["a.txt", "b.txt", "b.txt"]
    (text / "c.txt").write_text("another long one")
    TextFiles(str(text)).identity(memo)
    assert read[3:] == ["b.txt", "c.txt"]
    (text / "a.txt").write_text("LONG ENOUGH")
    (text / "c.txt").unlink()
    assert TextFiles(str(text)).identity(memo) != before and read[5:] == ["a.txt", "b.txt"]
    (text / "a.txt").write_text("long enough")
    assert TextFiles(str(text)).identity(tmp_path / "fresh") == before, "as without what was kept"


def test_an_identity_that_a_crash_cut_short_is_found_anew(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    identity = JsonLines(str(tmp_path)).identity(tmp_path / ".memo")
    (memo,) = (tmp_path / ".memo").iterdir()
    memo.write_text("")
    assert JsonLines(str(tmp_path)).identity(tmp_path / ".memo") == identity == memo.read_text()


def test_hugging_face(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Iterator[dict[str, Any]]:
        asked.append((arguments, options))
        if arguments[0] == "gone":
            raise FileNotFoundError("Dataset 'gone' doesn't exist on the Hub")
        return iter([{"text": text, "n": 1} for text in [*TEXTS, None]])

    library = types.ModuleType("datasets")
    library.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    source = HuggingFace("owner/name", subset="en", split="train", revision="abc")
    assert source.problems("data") == []
    assert list(source.documents()) == TEXTS
    assert asked == [(("owner/name", "en"), {"split": "train", "revision": "abc", "streaming": True})]
    with pytest.raises(ValueError, match=r"owner/name \(train\), row 0: no field 'body'"):
        list(HuggingFace("owner/name", field="body").documents())
    with pytest.raises(ValueError, match=r"gone \(train\) can't be opened: Dataset 'gone' doesn't exist"):
        list(HuggingFace("gone").documents())
    assert source.identity(tmp_path) != HuggingFace("owner/name", subset="en", revision="abd").identity(tmp_path)


def test_hugging_face_breaks_off(monkeypatch: pytest.MonkeyPatch):
    def rows() -> Iterator[dict[str, Any]]:
        yield {"text": "x\ud83d"}
        raise RuntimeError("the connection was closed")

    library = types.ModuleType("datasets")
    library.load_dataset = lambda *_, **__: rows()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    documents = HuggingFace("owner/name").documents()
    assert next(documents) == "x\ufffd"
    with pytest.raises(ValueError, match=r"owner/name \(train\), behind row 0: the connection was closed"):
        next(documents)


def test_hugging_face_folder_is_identified_by_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found: list[str] = []
    for project in ("one", "two"):
        (tmp_path / project / "corpus").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / project)
        for texts in (TEXTS, [*TEXTS, project]):
            write_lines(Path("corpus/train.jsonl"), texts)
            found.append(HuggingFace("corpus").identity(tmp_path / "memo"))
    assert found[0] == found[2] and len(set(found)) == 3
    assert HuggingFace("corpus", split="test").identity(tmp_path / "memo") not in found


def test_files_that_swap_their_splits_are_other_data(tmp_path: Path):
    """The library tells splits by the names of files; here the contents stay the same in the order of the names."""
    files = {"a/train.jsonl": "one", "b/validation.jsonl": "two"}
    for name, text in files.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        write_lines(tmp_path / "data" / name, [text])
    before = HuggingFace(str(tmp_path / "data")).identity(tmp_path / "memo")
    (tmp_path / "data/a/train.jsonl").rename(tmp_path / "data/a/validation.jsonl")
    (tmp_path / "data/b/validation.jsonl").rename(tmp_path / "data/b/train.jsonl")
    assert HuggingFace(str(tmp_path / "data")).identity(tmp_path / "memo") != before
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "moved/a/validation.jsonl").rename(tmp_path / "moved/a/train.jsonl")
    (tmp_path / "moved/b/train.jsonl").rename(tmp_path / "moved/b/validation.jsonl")
    assert HuggingFace(str(tmp_path / "moved")).identity(tmp_path / "memo") == before


@pytest.mark.parametrize(
    ("source", "module", "extra"),
    [
        (HuggingFace("owner/name"), "datasets", "hf"),
        (ParquetFiles("a.parquet"), "pyarrow", "parquet"),
        (JsonLines("a.jsonl.zst"), "zstandard", "zstd"),
    ],
)
def test_a_missing_library_is_a_problem_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Any, module: str, extra: str
):
    monkeypatch.chdir(tmp_path)
    for name in ("a.parquet", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(zstandard.compress(b""))
    for name in [module, *(name for name in sys.modules if name.split(".")[0] == module)]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("meshloom.data.documents.formats.find_spec", lambda name: None)
    (problem,) = source.problems("data")
    assert f"needs {module}, which is not installed; pip install 'meshloom[{extra}]'" in str(problem)
    with pytest.raises(ValueError, match=rf"needs {module}.*pip install 'meshloom\[{extra}\]'"):
        list(source.documents())


def test_hugging_face_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_lines(tmp_path / "train.jsonl", TEXTS)
    assert list(HuggingFace(str(tmp_path)).documents()) == TEXTS


def test_a_record_with_a_member_object_lacks_its_field(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "object": "text_completion", "body": "words"}\n')
    (problem,) = JsonLines(str(tmp_path / "a.jsonl")).problems("data")
    assert problem.key == "data.field" and "a.jsonl' has no field 'text'" in problem.message
