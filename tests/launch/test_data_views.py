"""`meshloom data show` and `stats`: a corpus counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshloom.launch.data import main

WORDS = ["recipe=quickstart", "data=jsonl", "data.tokenizer=bytes", "data.packing=bestfit", "data.document_mask=true"]
STAGES = ["stages={one:{tokens:64},two:{tokens:64,data:{seq_len:32}}}", "trainer.steps=null"]
TEXTS = ["one two", "three four five", "six"]  # 8, 16 and 4 tokens with their ends


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("MESHLOOM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return [*WORDS, f"data.input={tmp_path}/a.jsonl", "data.seq_len=16", "data.validation=0", "trainer.steps=3"]


def test_statistics_are_those_counted_by_hand(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", *words, "batch.samples=4", "--samples", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["seq_len"], found["samples"], found["tokens"]) == (16, 12, 192)
    source = found["sources"]["data"]
    assert (source["tokens"], source["documents"], source["samples"], source["longer"]) == (28, 3, 2, 0)
    assert source["epochs"] == 6.0 and source["padding"] == 0.125  # 4 of 32 positions
    assert [tuple(each.values()) for each in source["histogram"]] == [(4, 1, 4), (8, 1, 8), (16, 1, 16)]
    read = found["read"]
    # Each document's first token is none's target: 25 of 32 positions carry loss.
    first = {"samples": 2, "first": 0, "after_others": False}
    assert read == {**first, "documents": 1.5, "learned": 25 / 32, "padding": 4 / 32, "bytes_per_token": 25 / 28}
    assert main(["stats", *words, "batch.samples=4", "--samples", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "jsonl: samples of 16 tokens; the run reads 12 samples, 192 tokens"
    assert said[2].split() == ["data", "1", "28", "3", "2", "12.5%", "0", "6.00"]
    assert said[-1].split() == ["up", "to", "16", "1", "document", "16", "tokens", "█" * 32]


def test_samples_are_shown_with_documents_loss_and_padding(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", *words, "--count", "2"]) == 0
    said = capsys.readouterr().out
    assert "── document 1, 8 tokens ──\n⟦o⟧\nne two<|endoftext|>\n── document 2, 4 tokens ──\n⟦s⟧\nix<|endoftext|>\n" in said
    assert "── 4 positions of padding ──" in said and "16 positions, 1 document, 15 carry loss, 0 are padding" in said
    assert main(["show", *words, "--json", "--sample", "1", "--color", "never"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["sample"] == 1 and len(one["tokens"]) == len(one["targets"]) == 16
    assert main(["show", *words, "--color", "always"]) == 0
    assert "\x1b[2m" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "validation"], "--set: the run has no samples 'validation'; use one of train"),
        (["--sample", "-1"], "argument --sample: '-1' is no whole number"),
        (["--sample", "4", *STAGES], "--sample: sample 4 is read in stages.two or later"),
        (["--smaple", "3"], "--smaple: there is no such switch"),
        (["data.sequence=4"], "data.sequence: there is no such key"),
        (["checkpoint=gone"], "checkpoint: 'gone' holds no complete checkpoint"),
    ],
)
def test_data_that_can_not_be_shown_are_refused(
    words: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", *words, *more]) == 2
    assert said in capsys.readouterr().err
