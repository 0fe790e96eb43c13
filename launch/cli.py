"""The `meshloom` command: dispatch to a subcommand, whose module is imported only then."""

from __future__ import annotations

import atexit
import difflib
import gc
import importlib
import os
import select
import signal
import sys
from collections.abc import Sequence

# At its end Python looks through all objects once more; PyTorch's take it seconds.
atexit.register(gc.freeze)

BAD_USAGE = 2
"""Exit code for no command, or an unknown one, as parsers of a command's own options have it."""

# name → (module with `main(argv) -> int`, what it does)
COMMANDS = {
    "train": ("train", "train a model; `meshloom train --help` lists recipes and keys"),
    "plan": ("plan", "what a run would need and take on a cluster, and its fastest layouts; starts nothing"),
    "check": ("check", "check GPUs, links, storage and versions of this machine, or of all nodes of a job"),
    "calibrate": ("calibrate", "measure this machine, so that plans know its speed"),
    "tune": ("tune", "the fastest settings that fit this machine, by arithmetic or by trying them"),
    "slurm": ("slurm", "print a complete sbatch script for a run"),
    "evaluate": ("evaluate", "loss, perplexity and bits per byte of a checkpoint's model, or benchmark tasks"),
    "generate": ("generate", "continue a prompt with a checkpoint's model"),
    "hparams": ("hparams", "what scaling laws recommend for a model and a number of tokens"),
    "keys": ("keys", "every key of the config: type, default, side, meaning"),
    "report": ("report.command", "one page about runs: losses, speed, saves, incidents, what differs between them"),
    "fit": ("fit", "fit scaling laws to finished runs, and draw the fits"),
    "data": ("data", "tokenize text into shards; look at a run's samples, and what its data hold"),
    "checkpoint": ("checkpoint", "list, inspect, verify, diff, prune, export and import checkpoints"),
}


def usage() -> str:
    """Return the text of `meshloom --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: meshloom <command> [arguments]", "", "commands:", *lines, "", "  --version  print the version"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Return its exit code: 2 for an unknown command, 128 + a signal's number as a shell gives it.

    That is 130 for a command that Ctrl-C ended, and 141 where the reader of its output has left, as `head` does.
    """
    try:
        try:
            code = _run(list(sys.argv[1:] if argv is None else argv))
        except SystemExit:  # of a parser, which has printed a help text
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_has_left():  # a pipe to another process is broken, which is a fault
            raise
        return 128 + signal.SIGPIPE


def _reader_has_left() -> bool:
    """Return whether nobody reads what is printed. Python then flushes it to nowhere at its end, in place of a message."""
    asked = select.poll()
    asked.register(sys.stdout, 0)  # an error is told unasked
    if not asked.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return True


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else BAD_USAGE
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        from .. import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(COMMANDS)}"
        print(f"meshloom has no command '{name}'; {hint}", file=sys.stderr)
        return BAD_USAGE
    if name == "train":  # its module imports Hydra, which the help does without
        from .train_help import usage as train_usage
        from .train_help import wants_help

        if wants_help(rest):
            print(train_usage(rest), end="")
            return 0
    module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    try:
        return int(module.main(rest))
    except KeyboardInterrupt:
        print(f"meshloom {name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
