"""Draw what `scale.py` measured, as curves from 64 to 16,384 ranks.

    python benchmarks/scale_picture.py docs/pictures/scale.svg FILE.json [FILE.json …]

Of the layouts of a model on a number of ranks the most costly one is drawn.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import pyplot

Row = dict[str, Any]
PANELS: dict[str, tuple[str, Callable[[Row], float]]] = {
    "A rank's first plan": ("s of a processor", lambda row: row["rank: describe, s"] + row["rank: derive its plan, s"]),
    "A later vote of rank 0": ("ms of a processor", lambda row: 1e3 * row["coordinator: later vote, s"]),
    "Commit of rank 0": ("s of a processor", lambda row: row["coordinator: reports and manifest, s"] + row["list: lengths, s"]),
    "Messages of a save, busiest rank": ("messages", lambda row: row["rank: messages of a save"]),
    "Manifest": ("MB", lambda row: row["manifest, bytes"] / 1e6),
    "Metadata of a host on a resume": ("MB", lambda row: row["resume: metadata of a host, bytes"] / 1e6),
}


def draw(rows: list[Row], path: str) -> None:
    """Draw a panel for each figure, with a curve for each model."""
    pyplot.rcParams |= {"svg.hashsalt": "scale", "svg.fonttype": "none"}  # the same picture from the same numbers; text as text
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    ranks = sorted({row["ranks"] for row in rows})
    for panel, (title, (unit, value)) in zip(axes.flat, PANELS.items(), strict=True):
        for model in dict.fromkeys(row["model"] for row in rows):
            of_model = [row for row in rows if row["model"] == model]
            worst = [max(value(row) for row in of_model if row["ranks"] == count) for count in ranks]
            panel.plot(ranks, worst, marker="o", markersize=4, label=model)
        panel.set_xscale("log", base=2)
        panel.set_xticks(ranks, [f"{count:,}" for count in ranks], fontsize=8)
        panel.set_ylim(bottom=0)
        panel.set(title=title, ylabel=unit, xlabel="ranks")
        panel.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw([row for file in sys.argv[2:] for row in json.loads(Path(file).read_text())], sys.argv[1])
