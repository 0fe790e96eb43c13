"""`meshloom evaluate`: loss, perplexity and bits per byte of a checkpoint's model on validation data, on any layout.

meshloom evaluate checkpoint=outputs/quickstart launch.nproc=2 parallel.tp=2
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.compose import quoted
from ..config.problems import ConfigError, Problem
from ..trainer.launching import run_processes, under_torchrun
from .switches import BAD_CONFIG, read_switches, refuse

if TYPE_CHECKING:
    from ..trainer.evaluate import EvaluationResult
    from ..trainer.resolve import ResolvedRun

MODULE = "meshloom.launch.evaluate"
USAGE = "usage: meshloom evaluate checkpoint=<folder> [samples=all|<n>] [--json] [--output FILE] [key=value …]"


@dataclass(frozen=True)
class EvaluateArguments:
    """The arguments of `meshloom evaluate`.

    checkpoint  a step-… folder, a folder of them or a run's (the newest complete one is taken), or hf:<folder>
    samples     validation samples of each evaluation: all, or a number (default: the run's trainer.eval_samples)
    --json      print one JSON object, and no table
    --output    also write the JSON object to a file
    key=value   any key of `meshloom train`, such as data=…, validation.…, precision=…, parallel.…, launch.nproc=…;
                what is not typed is the checkpoint's
    """

    checkpoint: str
    whole: bool
    words: tuple[str, ...]
    config_dir: str | None
    json: bool
    output: Path | None


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate here, or start torchrun. Return 0, 2 for bad arguments, 1 for a checkpoint or data that can't be read."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        print(f"{USAGE}\n\n{inspect.getdoc(EvaluateArguments)}")
        return 0
    try:
        arguments = read_arguments(words)
        resolved = resolve_evaluation(arguments)
        resolved.refuse()
    except ConfigError as error:
        return refuse(error)
    if resolved.world_size > 1 and not under_torchrun():
        from .torchrun import TorchRun

        return TorchRun(["--standalone", f"--nproc-per-node={resolved.world_size}", "-m", MODULE, *words]).run()
    return _evaluate_here(resolved, arguments)


def read_arguments(words: Sequence[str]) -> EvaluateArguments:
    """Read the command line. Raises ConfigError with what is wrong with the command's own arguments."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--json", action="store_true")
    own.add_argument("--output", type=Path)
    given, rest = own.parse_known_args(words)
    switches, _ = read_switches(rest)
    checkpoint, samples, keys, problems = "", None, list[str](), list[Problem]()
    for word in switches.overrides:
        name, _, value = word.partition("=")
        if name == "checkpoint":
            checkpoint = value
        elif name == "samples":
            samples = value
        elif name == "resume":
            problems.append(Problem("resume", "nothing is resumed", "give the checkpoint as checkpoint=…"))
        else:
            keys.append(word)
    if not checkpoint:
        problems.append(
            Problem("checkpoint", "is not given", "write checkpoint=<a step-… folder, a run's folder, or hf:<folder>>")
        )
    if samples not in (None, "all"):
        if not samples.isdigit() or not int(samples):
            problems.append(Problem("samples", f"'{samples}' is no number of samples", "use all, or 1 or more"))
        keys.append(f"trainer.eval_samples={samples}")
    if problems:
        raise ConfigError(problems)
    return EvaluateArguments(checkpoint, samples == "all", tuple(keys), switches.config_dir, given.json, given.output)


def resolve_evaluation(arguments: EvaluateArguments) -> ResolvedRun:
    """Resolve the config to evaluate with: the checkpoint's, with the typed keys on top. Raises ConfigError.

    Text that the run has not read is cut by the checkpoint's tokenizer, where a new one would be trained.
    """
    from ..data.config import TRAINED
    from ..trainer.find_checkpoint import checkpoint_manifest, find_checkpoint, is_import, tokenizer_beside
    from ..trainer.machine import process_problems
    from ..trainer.machine_gpus import machine_here
    from ..trainer.resolve import ResolveOptions, resolve

    checkpoint = find_checkpoint(arguments.checkpoint, "checkpoint")
    typed = [word.lstrip("+~").partition("=")[0] for word in arguments.words]
    chosen = any(key == "data" or key.startswith("data.") for key in typed)
    if not chosen and "recipe" not in typed and is_import(checkpoint_manifest(checkpoint).state):
        message = f"'{checkpoint}' was imported, and does not say what to evaluate it on"
        raise ConfigError([Problem("data", message, "type data=… with its keys, or recipe=…")])
    options = ResolveOptions(
        lambda config: run_processes(config.launch), more=lambda config: [*process_problems(config)], machine=machine_here
    )
    words = [*arguments.words, f"resume={quoted(str(checkpoint))}"]
    resolved = resolve(words, options, arguments.config_dir)
    would_train = chosen and not resolved.problems and getattr(resolved.config.data, "tokenizer", None) == TRAINED
    if would_train and (file := tokenizer_beside(checkpoint)) is not None:
        return resolve([*words, f"data.tokenizer={quoted(str(file))}"], options, arguments.config_dir)
    return resolved


def _evaluate_here(resolved: ResolvedRun, arguments: EvaluateArguments) -> int:
    """Evaluate as one of the processes; rank 0 prints. Return the exit code."""
    from ..checkpoint.errors import CheckpointError
    from ..data.shards import ShardError
    from ..trainer.all_ranks import PeerFailed
    from ..trainer.evaluate import evaluate
    from .once import is_first
    from .rank import configure_log

    if under_torchrun():
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # the launcher's wish to stop: there is nothing to save
    configure_log()
    try:
        result = evaluate(resolved, whole=arguments.whole)
    except (ConfigError, CheckpointError, ShardError) as error:
        if is_first(str(error)):
            print(error if isinstance(error, ConfigError) else f"meshloom evaluate: {error}", file=sys.stderr)
        return BAD_CONFIG if isinstance(error, ConfigError) else 1
    except PeerFailed as error:
        return BAD_CONFIG if error.config_error else 1
    if os.environ.get("RANK", "0") != "0":
        return 0
    written = json.dumps(result.as_json(), indent=2)
    print(written if arguments.json else table(result))
    if arguments.output is not None:
        try:
            arguments.output.write_text(written + "\n", encoding="utf-8")
        except OSError as error:
            print(f"meshloom evaluate: {arguments.output}: {error.strerror}", file=sys.stderr)
            return 1
    return 0


def table(result: EvaluationResult) -> str:
    """Lay out the result for a terminal: a line of each source, and of all where there are several."""
    rows = [["source", "weight", "samples", "tokens", "loss", "perplexity", "bits per byte"]]
    for each in result.sources:
        told = each.as_json()
        numbers = [_number(told[name]) for name in ("loss", "perplexity", "bits_per_byte")]
        weight = f"{each.weight:.3g}" if each.weight else "apart"
        rows.append([each.name or "data", weight, f"{each.samples:,}", f"{each.tokens:,}", *numbers])
    if len(result.sources) > 1:
        whole = result.as_json()
        rows.append(["mean", "", "", "", *(_number(whole[name]) for name in ("loss", "perplexity", "bits_per_byte"))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    head = f"{result.checkpoint}: step {result.step}, {result.precision}, {result.layout}"
    return "\n".join([head, *lines])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value < 1e5 else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
