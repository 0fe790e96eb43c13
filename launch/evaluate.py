"""`meshloom evaluate`: a checkpoint's model on validation data, on any layout, or on benchmark tasks of lm-eval.

meshloom evaluate checkpoint=outputs/quickstart launch.nproc=2 parallel.tp=2
meshloom evaluate checkpoint=outputs/quickstart tasks=arc_easy,hellaswag
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

from ..config.overrides import quoted
from ..config.per_host import share_on_host
from ..config.problems import ConfigError, Problem
from ..trainer.launching import run_processes, under_torchrun
from .exit_codes import BAD_CONFIG
from .switches import read_switches, refuse

if TYPE_CHECKING:
    from ..trainer.resolve import ResolvedRun

MODULE = "meshloom.launch.evaluate"
USAGE = "usage: meshloom evaluate checkpoint=<folder> [samples=all|<n>] [tasks=<name>,…] [--json] [--output FILE] [key=value …]"


@dataclass(frozen=True)
class EvaluateArguments:
    """The arguments of `meshloom evaluate`.

    checkpoint  a step-… folder, a folder of them or a run's (the newest complete one is taken), or hf:<folder>
    samples     validation samples of each evaluation: all, or a number (default: the run's trainer.eval_samples)
    tasks       evaluate on these tasks of lm-eval instead, by comma: see also tasks.folder, tasks.few_shot, tasks.limit
    context     of tasks: tokens that the model looks back at (default: the length that the run was trained with)
    --json      print one JSON object, and no table
    --output    also write the JSON object to a file
    key=value   any key of `meshloom train`, such as data=…, validation.…, precision=…, parallel.…, launch.nproc=…;
                what is not typed is the checkpoint's
    """

    checkpoint: str
    whole: bool
    tasks: bool
    context: int | None
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
        resolved = share_on_host("resolved", lambda: resolve_evaluation(arguments))
        resolved.refuse()
    except ConfigError as error:
        return refuse(error)
    if resolved.world_size > 1 and not under_torchrun():
        from .torchrun import TorchRun, say_starting

        if resolved.config.logging.progress:
            say_starting(resolved.world_size)
        return TorchRun(["--standalone", f"--nproc-per-node={resolved.world_size}", "-m", MODULE, *words]).run()
    return _evaluate_here(resolved, arguments)


def read_arguments(words: Sequence[str]) -> EvaluateArguments:
    """Read the command line. Raises ConfigError with what is wrong with the command's own arguments."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--json", action="store_true")
    own.add_argument("--output", type=Path)
    given, rest = own.parse_known_args(words)
    switches, _ = read_switches(rest)
    asked: dict[str, str] = {}
    keys, problems = list[str](), list[Problem]()
    for word in switches.overrides:
        name, _, value = word.partition("=")
        if name in ("checkpoint", "samples", "tasks", "context"):
            asked[name] = value
        elif name == "resume":
            problems.append(Problem("resume", "nothing is resumed", "give the checkpoint as checkpoint=…"))
        elif (key := name.lstrip("+~")) in ("tasks.names", "tasks.every"):
            fix = "write tasks=<name>,<name>" if key == "tasks.names" else "leave it out: they are evaluated once"
            problems.append(Problem(key, "is of a run", fix))
        else:
            keys.append(word)
    checkpoint, samples, tasks, context = (asked.get(name) for name in ("checkpoint", "samples", "tasks", "context"))
    if not checkpoint:
        problems.append(
            Problem("checkpoint", "is not given", "write checkpoint=<a step-… folder, a run's folder, or hf:<folder>>")
        )
    if samples not in (None, "all"):
        if not samples.isdigit() or not int(samples):
            problems.append(Problem("samples", f"'{samples}' is no number of samples", "use all, or 1 or more"))
        keys.append(f"trainer.eval_samples={samples}")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not names:
        problems.append(Problem("tasks", "names no task", "write tasks=<name>,<name>"))
    if context is not None and not (context.isdigit() and int(context)):
        problems.append(Problem("context", f"'{context}' is no number of tokens", "use 1 or more"))
    if tasks is None:
        of_tasks = [key for key in (word.partition("=")[0].lstrip("+~") for word in keys) if key.startswith("tasks.")]
        of_tasks += ["context"] if context is not None else []
        problems += [Problem(key, "has no meaning without tasks", "name tasks=…, or leave it out") for key in of_tasks]
    elif samples is not None:
        problems.append(Problem("samples", "has no meaning for tasks", "leave it out; tasks.limit=… takes fewer questions"))
    problems += _output_problems(given.output)
    if problems or checkpoint is None:
        raise ConfigError(problems)
    # A run's own tasks are not evaluated unless they are named: only what is typed is evaluated.
    keys.append(f"tasks.names=[{','.join(map(quoted, names))}]")
    context_size = None if context is None else int(context)
    rest = (tuple(keys), switches.config_dir, given.json, given.output)
    return EvaluateArguments(checkpoint, samples == "all", tasks is not None, context_size, *rest)


def _output_problems(output: Path | None) -> list[Problem]:
    """Return what keeps the file from being written, on the process that writes it."""
    if output is None or os.environ.get("RANK", "0") != "0":
        return []
    if output.is_dir():
        return [Problem("--output", f"'{output}' is a folder", "name a file")]
    if not output.parent.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK):
        return [Problem("--output", f"'{output}' can't be written", "name a file in a folder that exists, and that is yours")]
    return []


def resolve_evaluation(arguments: EvaluateArguments) -> ResolvedRun:
    """Resolve the config to evaluate with: the checkpoint's, with the typed keys on top. Raises ConfigError.

    Text that the run has not read is cut by the checkpoint's tokenizer, where a new one would be trained.
    """
    from ..trainer.find_checkpoint import checkpoint_manifest, find_checkpoint, is_import, tokenizer_beside
    from ..trainer.machine import process_problems
    from ..trainer.machine_gpus import machine_here
    from ..trainer.resolve import ResolveOptions, resolve
    from ..trainer.resumed_config import recipe_islands

    checkpoint = find_checkpoint(arguments.checkpoint, "checkpoint")
    state = checkpoint_manifest(checkpoint).state
    typed = [word.lstrip("+~").partition("=")[0] for word in arguments.words]
    chosen = any(key == "data" or key.startswith("data.") for key in typed)
    no_data = not chosen and "recipe" not in typed and is_import(state)
    if no_data and not arguments.tasks:
        message = f"'{checkpoint}' was imported, and does not say what to evaluate it on"
        raise ConfigError([Problem("data", message, "type data=… with its keys, or recipe=…")])
    if no_data and arguments.context is None:
        message = f"'{checkpoint}' was imported, and does not say how far its model looks back"
        raise ConfigError([Problem("context", message, "give the length that it was trained with as context=…")])
    options = ResolveOptions(
        lambda config: run_processes(config.launch),
        data_elsewhere=arguments.tasks,  # tasks need none
        more=lambda config: [*process_problems(config)],
        machine=machine_here,
        tokenizer=tokenizer_beside(checkpoint) if chosen else None,
    )
    words = [*arguments.words, f"resume={quoted(str(checkpoint))}"]
    if recipe_islands(state) != 1:
        words.append("optim.local.islands=1")  # a checkpoint's weights are those that its islands agreed on
    return resolve(words, options, arguments.config_dir)


def _evaluate_here(resolved: ResolvedRun, arguments: EvaluateArguments) -> int:
    """Evaluate as one of the processes. Return the exit code."""
    from .rank import tell_errors

    if under_torchrun():
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # the launcher's wish to stop: there is nothing to save
    where = "standard output" if arguments.output is None else str(arguments.output)
    return tell_errors(lambda: _evaluate(resolved, arguments), where)


def _evaluate(resolved: ResolvedRun, arguments: EvaluateArguments) -> int:
    """Evaluate as one of the processes; rank 0 prints. Return the exit code."""
    from ..trainer.all_ranks import PeerFailed
    from .evaluate_table import loss_table, task_table

    try:
        if arguments.tasks:
            from ..trainer.tasks.on_checkpoint import evaluate_tasks

            result = evaluate_tasks(resolved, arguments.context or resolved.config.data.seq_len)
            table = task_table(result)
        else:
            from ..trainer.evaluate import evaluate

            result = evaluate(resolved, whole=arguments.whole)
            table = loss_table(result)
    except PeerFailed as error:
        return BAD_CONFIG if error.config_error else 1
    if os.environ.get("RANK", "0") != "0":
        return 0
    written = json.dumps(result.as_json(), indent=2)
    print(written if arguments.json else table)
    if arguments.output is not None:
        arguments.output.write_text(written + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
