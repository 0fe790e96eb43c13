"""A journal that somebody wrote: never deleted, and refused by the entry that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshloom.checkpoint.errors import CheckpointError
from meshloom.trainer.guard.journal import Journal, read_journal

GOOD = {"step": 1, "to": 0, "ranges": [[5, 7]], "reason": "by hand", "data": "d"}


def written(folder: Path, *entries: Any) -> str:
    (folder / "rewinds.json").write_text(json.dumps({"rewinds": entries}))
    return str(folder)


BAD = [
    (7, "is no object"),
    ({**GOOD, "range": []}, "unknown range"),
    ({"ranges": [[5, 7]]}, "lacks data, reason, step, to"),
    ({**GOOD, "step": "1"}, "a step that is no int"),
    ({**GOOD, "ranges": [[7, 5]]}, "range .7, 5."),
    ({**GOOD, "ranges": [5, 7]}, "range 5 "),
]


@pytest.mark.parametrize(("entry", "said"), BAD)
def test_a_bad_entry_is_refused_by_its_place(tmp_path: Path, entry: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=rf"rewinds\[1\].*{said}"):
        read_journal(written(tmp_path, GOOD, entry))


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_run_that_begins_anew_moves_the_file_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Journal("d")
    journal.add([GOOD])
    journal.write(f"{prefix}{tmp_path}")
    (found,) = read_journal(tmp_path)
    assert found == {**found, **GOOD}
    assert read_journal(written(tmp_path, GOOD)) == [GOOD]
    Journal("d").begin(f"{prefix}{tmp_path}")
    assert read_journal(tmp_path) == []
    assert json.loads((tmp_path / "rewinds-before.json").read_text())["rewinds"] == [GOOD]
