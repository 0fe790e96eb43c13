"""Folders of runs that never ran: a config, rows of metrics, incidents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from meshloom.trainer.sides import annotated_yaml
from support.configs import config_of


def step_row(step: int, **numbers: Any) -> dict[str, Any]:
    """The row of a step as a run writes it: 1,000 tokens and 10 samples a step, a tenth of a second each."""
    return {
        "step": step,
        "loss": 8.0 / (1 + step),
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens": 1000 * step,
        "samples": 10 * step,
        "batch_samples": 10,
        "step_seconds": 0.1,
        "tokens_per_second": 10_000.0,
        "time": 1000.0 + step,
        **numbers,
    }


def write_run(
    folder: Path,
    rows: Iterable[Mapping[str, Any]],
    *words: str,
    incidents: Iterable[Mapping[str, Any]] = (),
) -> Path:
    """A run's folder. words: of its config, besides recipe=quickstart."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(annotated_yaml(config_of("recipe=quickstart", *words)))
    (folder / "run.json").write_text("{}")
    for name, lines in (("metrics.jsonl", rows), ("incidents.jsonl", incidents)):
        (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder
