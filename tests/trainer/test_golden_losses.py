"""The first ten losses of the quickstart's model, as commit 292efbd had them.

Random tokens stand for the quickstart's text, which is cut from the Python that is installed. Float64 is pinned to what
reassociation may change, float32 to what CPUs differ in.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.ranks import run_ranks
from support.tiny_run import train

WORDS = (
    "recipe=quickstart data=synthetic data.seq_len=32 data.vocabulary=64 batch.samples=8 batch.micro=4 trainer.steps=10 "
    "trainer.eval_every=0 trainer.sample_prompt=null checkpoint.every=0 logging.progress=false"
)
LOSSES = [
    4.242444820508166,
    4.206257159279939,
    4.201679464677605,
    4.208958099403139,
    4.2205729589010685,
    4.247522222895519,
    4.241348155026715,
    4.216133051343581,
    4.210277797277254,
    4.189046885426222,
]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-9), ("fp32", 1e-4)])
def test_the_first_losses_are_what_they_were(tmp_path: Path, precision: str, tolerance: float) -> None:
    words = [*WORDS.split(), f"precision={precision}", f"output_dir={tmp_path}"]
    assert run_ranks(1, train, words) == [0]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(LOSSES, rel=tolerance)
