"""Measure how the best learning rate moves with batch size and number of tokens, beside the power scheduler's law.

    python benchmarks/power_transfer.py --output outputs/power --processes 8
    python benchmarks/power_transfer.py --output outputs/power --draw

The law (arXiv 2408.13359) is lr = 4.6 β T^-0.51, β the batch in sequences of 4,096 tokens and T the tokens of the run, fitted
to WSD runs of 12 to 121 M parameters on 2 to 256 B tokens. Here a model of 1 M parameters is trained on a few million tokens
of the standard library: far outside of that range, so what can be compared is the powers. For every batch and length a row of
learning rates is tried; `meshloom fit`'s functions find each row's best and fit the power law through them. Every run is what
`meshloom train` does. The processes share whatever devices there are. Runs that have finished are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from many_runs import FINISHED, run_all

SEQ_LEN = 256
TOKENS = (2**19, 3 * 2**19, 2**22)
RATES = {16: 2.5e-4, 64: 5e-4, 128: 7e-4}
"""Batch in samples → the lowest learning rate tried; the others are 2, 4, … 64 times it."""
SIZES = 7
MICRO = {16: 16, 64: 64, 128: 64}
LAW = (4.6, 1.0, -0.51)

COMMON = [
    *("recipe=quickstart", "data=stdlib", f"data.seq_len={SEQ_LEN}", "resume=none", "trainer.steps=null"),
    *("trainer.sample_prompt=null", "trainer.eval_every=null", "trainer.eval_samples=512", "checkpoint.every=0"),
    *("logging.progress=false", "logging.every=1", "schedule=wsd", "schedule.warmup=5%", "schedule.decay=10%"),
    *("schedule.decay_form=exponential_to_zero", "batch=fixed"),
]


def jobs(output: Path, tokens: list[int], extra: list[str]) -> dict[int, list[list[str]]]:
    """Micro-batch → command lines of `meshloom train`, the longest first. One micro-batch, one compilation."""
    lines: dict[int, list[list[str]]] = {}
    for length, (batch, lowest), size in itertools.product(sorted(tokens, reverse=True), RATES.items(), range(SIZES)):
        rate = lowest * 2**size
        folder = output / "runs" / f"batch-{batch}" / f"tokens-{length}" / f"lr-{rate:g}"
        line = [*COMMON, f"batch.samples={batch}", f"batch.micro={MICRO[batch]}", f"trainer.tokens={length}"]
        lines.setdefault(MICRO[batch], []).append([*line, f"optim.lr={rate:g}", *extra, f"output_dir={folder}"])
    return lines


def dealt(lines: dict[int, list[list[str]]], processes: int) -> list[list[list[str]]]:
    """The command lines of each process: those of one micro-batch, dealt in turn over that micro-batch's processes."""
    shares: list[list[list[str]]] = []
    each = max(1, processes // max(1, len(lines)))
    for group in lines.values():
        shares += [group[start::each] for start in range(each) if group[start::each]]
    return shares


def collect(output: Path) -> dict[str, Any]:
    """The sweeps of the finished runs and the law through their best rates, as plain JSON; summary.json."""
    from meshloom.launch.fit_runs import fit_all, read_runs

    fits = fit_all(read_runs(sorted({path.parent for path in (output / "runs").rglob(FINISHED)})))
    sweeps = [
        {
            **{"batch": sweep.at["B"], "tokens": sweep.at["D"], "rates": sweep.values, "losses": sweep.losses},
            **{"best": sweep.best.value, "loss": sweep.best.loss, "inside": sweep.best.inside},
        }
        for sweep in fits.lr_sweeps
    ]
    law = None
    if fits.lr is not None:
        law = {"constant": fits.lr.constant, "exponents": fits.lr.exponents, "errors": fits.lr.errors, "spread": fits.lr.spread}
    summary = {"sweeps": sweeps, "law": law, "missing": fits.missing.get("learning rate")}
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def published(batch: float, tokens: float) -> float:
    """The paper's law. batch: in tokens."""
    return LAW[0] * (batch / 4096) ** LAW[1] * tokens ** LAW[2]


def table(summary: dict[str, Any]) -> str:
    """Markdown: the best rate of each row, and the powers."""
    lines = ["| batch, tokens | T, tokens | best lr | loss there | the paper's law |", "|---|---|---|---|---|"]
    for sweep in summary["sweeps"]:
        edge = "" if sweep["inside"] else " (at the edge)"
        lines.append(
            f"| {sweep['batch']:.0f} | {sweep['tokens']:.0f} | {sweep['best']:.2e}{edge} | {sweep['loss']:.4f} "
            f"| {published(sweep['batch'], sweep['tokens']):.2e} |"
        )
    law = summary["law"]
    if law is not None:
        powers = " · ".join(f"{name}^{power:.2f} (± {law['errors'][name]:.2f})" for name, power in law["exponents"].items())
        lines.append(
            f"\nlr = {law['constant']:.3g} · {powers}, scatter {100 * law['spread']:.0f} %; the paper's: β^1 · T^-0.51"
        )
    else:
        lines.append(f"\nno law: {summary['missing']}")
    return "\n".join(lines)


def draw(summary: dict[str, Any], folder: Path) -> None:
    """Left: loss over learning rate. Right: the best rates over tokens, with the fit and the paper's law."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    batches = sorted({sweep["batch"] for sweep in summary["sweeps"]})
    lengths = sorted({sweep["tokens"] for sweep in summary["sweeps"]})
    for sweep in summary["sweeps"]:
        color, style = f"C{batches.index(sweep['batch'])}", ("-", "--", ":")[lengths.index(sweep["tokens"]) % 3]
        label = f"batch {sweep['batch'] / 4096:g} × 4,096 tokens, T {sweep['tokens'] / 1e6:.1f} M"
        left.plot(sweep["rates"], sweep["losses"], style, color=color, marker=".", label=label)
        left.plot(sweep["best"], sweep["loss"], "*", color=color, markersize=11 if sweep["inside"] else 0)
    for number, batch in enumerate(batches):
        found = [sweep for sweep in summary["sweeps"] if sweep["batch"] == batch and sweep["inside"]]
        right.plot([s["tokens"] for s in found], [s["best"] for s in found], "*", color=f"C{number}", markersize=11)
        grid = np.geomspace(lengths[0], lengths[-1], 20)
        right.plot(grid, [published(batch, t) for t in grid], ":", color=f"C{number}")
        if summary["law"]:
            powers = summary["law"]["exponents"]
            fitted = [summary["law"]["constant"] * batch ** powers.get("B", 0) * t ** powers.get("D", 0) for t in grid]
            right.plot(grid, fitted, "-", color=f"C{number}", label=f"batch {batch / 4096:g} × 4,096 tokens")
    right.plot([], [], ":", color="grey", label="4.6 β T^-0.51 (arXiv 2408.13359)")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    right.set_yscale("log")
    left.set(xlabel="learning rate", ylabel="validation loss")
    right.set(xlabel="tokens of the run", ylabel="best learning rate")
    for ending in ("svg", "png"):
        figure.savefig(folder / f"power.{ending}", dpi=80)


def main() -> None:
    """Run what is missing, then fit, tabulate and, where asked, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/power"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="what has not finished by then is left out")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides, for all runs")
    parser.add_argument("--draw", action="store_true", help="only draw what summary.json says")
    parser.add_argument("--collect", action="store_true", help="only fit what has finished")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads((arguments.output / "summary.json").read_text()), arguments.output)
        return
    if not arguments.collect:
        lines = jobs(arguments.output, arguments.tokens, arguments.set)
        run_all(dealt(lines, arguments.processes), arguments.output, arguments.seconds)
    print(table(collect(arguments.output)))


if __name__ == "__main__":
    main()
