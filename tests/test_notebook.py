"""The notebook of the documents is well formed, and its cells run in order, on a tiny model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from meshloom.data.tokenizing.tokenizer import Tokenizer
from support.tiny_run import ANY_DATA

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tour.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def digest(sources: list[list[str]]) -> str:
    """The digest of the code of which a notebook stores the outputs."""
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def test_the_notebook_is_of_format_4_5() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    assert [cell["id"] for cell in cells("code") if "parameters" in cell["metadata"].get("tags", [])] == ["parameters"]


def test_the_notebook_shows_the_outputs_of_its_cells() -> None:
    """Stored by one execution from top to bottom: with its picture, small, without an error or a path of the machine."""
    assert NOTEBOOK.stat().st_size < 300_000
    executed = cells("code")
    assert [cell["execution_count"] for cell in executed] == list(range(1, len(executed) + 1))
    outputs = {cell["id"]: cell["outputs"] for cell in executed}
    assert [name for name, found in outputs.items() if not found] == ["parameters"]
    assert any("image/png" in each["data"] for each in outputs["plot"])
    assert "largest relative difference of 40 losses" in json.dumps(outputs["promise"])
    told = json.dumps(list(outputs.values()))
    ran = json.loads(NOTEBOOK.read_text())["metadata"]["meshloom"]["executed"]
    now = digest([cell["source"] for cell in executed])
    assert ran == now, f"a cell has changed: execute the notebook anew, then set metadata.meshloom.executed to {now}"
    assert not any(word in told for word in ("Traceback", '"error"', "/tmp/", "/home/", "/root/"))


def test_the_cells_of_the_notebook_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With parameters of its own: a tiny model on a page of text, and another micro-batch in place of two processes."""
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    Tokenizer.bytes().save(tmp_path / "bytes.json")
    Path("text.txt").write_text("def and(this): return that\n" * 200)
    text = ["data=text", "data.input=text.txt", "data.tokenizer=bytes.json", "data.seq_len=16", "data.validation=0.1"]
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    own = {"STEPS": 4, "RECIPE": [*ANY_DATA, *text, cache], "LAYOUT": ["batch.micro=4"], "FOLDER": "outputs/tour"}
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells("code"):
        if "parameters" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), names)
            assert own.keys() == {name for name in names if name.isupper()}
            names |= own
        else:
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}: {cell['id']}", "exec"), names)
    assert names["run"].metrics["loss"][0].tolist() == [1, 2, 3, 4]
    assert names["difference"] < 1e-9  # the tiny run is in float64
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in names["folder"].iterdir()}
