"""Faults of records: named by file, place and key, with what to do, since a user may have ten thousand files."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from meshloom.config.problems import ConfigError
from meshloom.data.config import DataMixtureConfig
from meshloom.data.documents.chat import ChatTemplate
from meshloom.data.documents.record_text import RecordText
from meshloom.data.documents.records import JsonLines, ParquetFiles
from meshloom.data.documents.sources import FileSource, TextFiles
from meshloom.data.mixture import Mixture
from meshloom.launch.data import main

ROWS, GROUP = 2500, 1000
CHAT = RecordText(messages="turns", template=ChatTemplate("{% generation %}{{ messages[0].content }}{% endgeneration %}", {}))


def said(source: FileSource) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        list(source.documents())
    return str(caught.value)


def write_rows(path: Path, column: pa.Array, name: str = "text") -> Path:
    pyarrow.parquet.write_table(pa.table({name: column}), path, row_group_size=GROUP, compression="NONE", use_dictionary=False)
    return path


def test_a_row_of_parquet_is_named_with_its_group(tmp_path: Path) -> None:
    turns: list[Any] = [[{"role": "user", "content": "a"}] for _ in range(ROWS)]
    turns[2100] = None
    write_rows(tmp_path / "a.parquet", pa.array(turns), "turns")
    expected = r"a\.parquet, row 2100 counted from 0, in row group 2: is no conversation .*\(data\.messages\); name .*mend that"
    assert re.search(expected, said(ParquetFiles(str(tmp_path), record=CHAT)))


def test_a_row_of_parquet_in_another_encoding_is_named(tmp_path: Path) -> None:
    texts = [b"Feet"] * ROWS
    texts[1030] = "Füße".encode("latin-1")
    write_rows(tmp_path / "a.parquet", pa.array(texts, pa.binary()).view(pa.string()))
    line = said(ParquetFiles(str(tmp_path)))
    assert re.search(
        r"a\.parquet, row 1030 counted from 0, in row group 1: not UTF-8 .*\(data\.input\); mend that record", line
    )


def test_damage_of_parquet_is_told_by_where_it_begins(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", pa.array([f"{number:09}" for number in range(ROWS)]))
    content = bytearray(path.read_bytes())
    header = content.index(b"000002000") - 30  # of the third group's page
    content[header : header + 4] = b"\xff" * 4
    path.write_bytes(content)
    line = said(ParquetFiles(str(tmp_path)))
    place = re.search(r"a\.parquet, at row (\d+) counted from 0, in row group (\d) or behind it: .*\(data\.input\); copy", line)
    assert place and 0 < int(place[1]) <= 2000 and int(place[2]) == int(place[1]) // GROUP
    path.write_bytes(content[:-4])
    assert re.search(r"a\.parquet: .*\(data\.input\); copy the file again", said(ParquetFiles(str(tmp_path))))
    path.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        list(ParquetFiles(str(tmp_path)).read(path))
    assert caught.value.filename == str(path)


@pytest.mark.parametrize(
    ("line", "leaf", "fix"),
    [
        ("{", "input", "mend that record, or leave it out"),
        ("3", "input", "give files of records alone, or mend that record, or leave it out"),
        ('{"a": 1}', "field", "name the member that holds the text, or mend that record, or leave it out"),
        ('{"text": 1}', "field", "name the member that holds the text, or mend that record, or leave it out"),
    ],
)
def test_a_line_of_json_is_named_with_key_and_fix(tmp_path: Path, line: str, leaf: str, fix: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    assert re.search(rf"a\.jsonl, line 2: .* \(data\.{leaf}\); {fix}$", said(JsonLines(str(tmp_path))))
    (tmp_path / "a.jsonl").write_text(f'[{{"text": "fine"}},\n{line}\n]')
    place = "line 3" if line == "{" else "record 2"
    assert re.search(rf"a\.jsonl, {place}: .* \(data\.{leaf}\); {fix}$", said(JsonLines(str(tmp_path))))


def test_a_conversation_that_is_none_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"turns": [{"role": "user", "content": "a"}]}\n{"turns": "b"}\n')
    assert re.search(
        r"a\.jsonl, line 2: is no conversation .*\(data\.messages\); name .* mend", said(JsonLines(str(tmp_path), record=CHAT))
    )


def test_a_first_record_that_is_no_object_is_a_matter_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('["text"]\n')
    (problem,) = JsonLines(str(tmp_path)).problems("data")
    assert (
        problem.key == "data.input" and "the first record of" in problem.message and "is not a JSON object" in problem.message
    )


@pytest.mark.parametrize("kind", [TextFiles, JsonLines])
def test_damaged_and_foreign_files_are_told_with_key_and_fix(tmp_path: Path, kind: type[Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(b'{"text": "fine"}\n' * 9)[:-20])
    assert re.search(r"a\.jsonl: damaged .*\(data\.input\); copy the file again, or leave it out$", said(kind(str(path))))
    path.write_bytes('{"text": "fine"}\n{"text": "Füße"}\n'.encode("latin-1"))
    assert re.search(r"a\.jsonl.*: not UTF-8 text .* \(data\.input\); convert it", said(kind(str(path))))


def test_a_source_is_named_by_its_own_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"body": "x"}\n')
    node = {"_target_": "meshloom.data.nodes.Jsonl", "input": str(tmp_path / "a.jsonl")}
    for tokenizer in ("bpe", "bytes"):
        values = {"tokenizer": tokenizer, "cache_dir": str(tmp_path / "cache"), "weights": {"web": 1}}
        mixed = Mixture(DataMixtureConfig(sources={"web": node}, **values), 1)
        with pytest.raises(
            (ConfigError, ValueError), match=r"a\.jsonl, line 2: no field 'text'.*\(data\.sources\.web\.field\)"
        ):
            mixed.prepare()


def test_the_command_names_its_own_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"body": "x"}\n')
    words = [f"input={tmp_path}", f"output={tmp_path}/out", "tokenizer=bytes"]
    assert main(["tokenize", *words]) == 1
    assert "line 2: no field 'text' among body (field); name the member" in capsys.readouterr().err


def test_a_warning_names_the_source_by_its_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", None)))
    source = JsonLines(str(tmp_path))
    source.key = "validation.web"
    assert list(source.documents()) == ["one"]
    assert "validation.web.field: 1 of 2 records" in caplog.text


def test_half_a_surrogate_pair_in_a_conversation_is_replaced(tmp_path: Path) -> None:
    """JSON can write one; a run ended for it, naming no file."""
    (tmp_path / "a.jsonl").write_text('{"turns": [{"role": "assistant", "content": "x\\ud83d y"}]}\n')
    (text,) = JsonLines(str(tmp_path), record=CHAT).documents()
    assert text.encode().decode() == "x\ufffd y"
