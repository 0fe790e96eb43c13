"""`meshloom fit`: fit scaling laws to finished runs, and draw the fits.

    meshloom fit outputs/sweep --output fits

What can be fitted depends on what the runs vary: learning rates give optima, optima over sizes, lengths and batches give
power laws (the step law's and the power scheduler's form), losses over sizes and lengths give L(N, D), and loss curves over
batch sizes give the critical batch, as in MiniCPM's and "Unraveling the Mystery of Scaling Laws"'s small experiments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.problems import ConfigError
from ..config.words import counted
from ..optim.scaling.fitting import PowerLaw
from .exit_codes import BAD_CONFIG
from .fit_runs import UNITS, FinishedRun, Fits, fit_all, read_runs


def main(argv: Sequence[str]) -> int:
    """Fit, print and draw. Return 0; 1 if neither a law nor an optimum was found, or nothing drawn; 2 without runs to read."""
    parser = argparse.ArgumentParser(prog="meshloom fit", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders that hold some")
    parser.add_argument(
        "--varies",
        action="append",
        default=[],
        metavar="KEY",
        help="a key in which the runs may differ, such as seed",
    )
    parser.add_argument("--output", type=Path, help="folder for fit.png, fit.svg and fit.json (default: nothing is written)")
    arguments = parser.parse_intermixed_args(argv)
    try:
        runs = read_runs(arguments.runs, arguments.varies)
        fits = fit_all(runs)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    except ModuleNotFoundError as error:
        print(f"meshloom fit: {error}", file=sys.stderr)
        return 1
    print("\n".join(describe(runs, fits)))
    if arguments.output is not None:
        from .fit_plot import draw

        try:
            arguments.output.mkdir(parents=True, exist_ok=True)
            (arguments.output / "fit.json").write_text(json.dumps(as_json(fits), indent=2) + "\n")
            drawn = draw(fits, arguments.output)
        except (ModuleNotFoundError, OSError) as error:
            print(f"meshloom fit: {error}", file=sys.stderr)
            return 1
        for path in drawn:
            print(f"drawn: {path}")
    laws = (fits.lr, fits.batch, fits.loss, fits.critical)
    return 0 if any(laws) or any(sweep.best.inside for sweep in [*fits.lr_sweeps, *fits.batch_sweeps]) else 1


def describe(runs: Sequence[FinishedRun], fits: Fits) -> list[str]:
    """Return the lines of the report."""
    lines = [f"{counted(len(runs), 'finished run')}. {UNITS}", ""]
    for title, sweeps, unit in (("learning rate", fits.lr_sweeps, ""), ("batch", fits.batch_sweeps, " tokens")):
        for sweep in sweeps:
            at = ", ".join(f"{name} = {value:.4g}" for name, value in sweep.at.items())
            edge = "" if sweep.best.inside else "  (at the edge of its sweep: not used)"
            lines.append(f"best {title} at {at}: {sweep.best.value:.4g}{unit}, loss {sweep.best.loss:.4f}{edge}")
    laws: dict[str, tuple[object | None, float]] = {
        "learning rate": (fits.lr, fits.lr.spread if fits.lr else 0.0),
        "batch": (fits.batch, fits.batch.spread if fits.batch else 0.0),
        "loss": (fits.loss, fits.loss.spread if fits.loss else 0.0),
        "critical batch": (fits.critical and fits.critical[0], fits.critical[0].spread if fits.critical else 0.0),
    }
    lines.append("")
    for name, (law, spread) in laws.items():
        scatter = f"  (scatter around it {100 * spread:.2g} %)" if law else ""
        lines.append(f"{name} = {law}{scatter}" if law else f"{name}: not fitted, {fits.missing[name]}")
    if fits.critical:
        law = fits.critical[0]
        alpha = -1 / law.exponents["L"]
        lines.append(f"to use it: batch=critical_loss batch.tokens={law.constant:.4g} batch.alpha={alpha:.4g}")
    return lines


def as_json(fits: Fits) -> dict[str, Any]:
    """Return the fits as plain JSON."""

    def power(law: PowerLaw | None) -> dict[str, Any] | None:
        return None if law is None else {"constant": law.constant, "exponents": law.exponents, "spread": law.spread}

    critical = fits.critical
    return {
        "units": UNITS,
        "learning_rate": power(fits.lr),
        "batch": power(fits.batch),
        "loss": None if fits.loss is None else vars(fits.loss),
        "critical_batch": None if critical is None else power(critical[0]),
        "critical_batch_at": None if critical is None else {f"{loss:.6g}": fit.batch for loss, fit in critical[1].items()},
        "not_fitted": fits.missing,
    }
