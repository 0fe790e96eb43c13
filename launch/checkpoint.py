"""`meshloom checkpoint`: look at checkpoints, check them, compare them, delete old ones, and bring them in and out."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..checkpoint.errors import CheckpointError, UnreadableError
from ..config.problems import ConfigError, Problem
from ..config.progress_bar import progress
from ..config.words import counted
from .exit_codes import BAD_CONFIG

if TYPE_CHECKING:
    from ..checkpoint.files import Files
    from ..models.mixture.config import ExpertsConfig


def main(argv: list[str]) -> int:
    """Run a subcommand. Returns 0 when all is well, 1 when something is damaged, different or impossible, 2 for a misuse.

    A misuse is a command line that can't be read, or keys that are wrong.
    """
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as exit_request:
        return int(exit_request.code or 0)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    except (CheckpointError, OSError) as error:
        print(f"meshloom checkpoint {arguments.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="meshloom checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Any, what: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=what, description=what)
        made.set_defaults(run=run)
        return made

    listing = command("list", _list, "the finished steps of a run, the one to resume from first")
    listing.add_argument("path", help="a folder of checkpoints or of a run, or a step's; a path or an fsspec URL")
    inspect = command("inspect", _inspect, "what a step holds: arrays by role, files, state")
    inspect.add_argument("path")
    inspect.add_argument("--arrays", action="store_true", help="list every array")
    inspect.add_argument("--state", action="store_true", help="print the saved state as JSON")
    verify = command("verify", _verify, "read every byte and check it; exit code 0 only if every block is as written")
    verify.add_argument("path")
    diff = command("diff", _diff, "the arrays in which two steps differ; exit code 1 if any do")
    diff.add_argument("one")
    diff.add_argument("other")
    prune = command("prune", _prune, "delete all complete steps but the newest")
    prune.add_argument("path")
    prune.add_argument("--keep", type=int, required=True, help="how many complete steps stay")
    stats = command("stats", _stats, "how long the saves of a run took, and what for")
    stats.add_argument("path")
    export = command("export", _export, "write a Hugging Face model folder, or DeepSpeed's rank files or universal folder")
    export.add_argument("path", help="a step, or a run (its newest step)")
    export.add_argument("output", type=Path)
    kinds = ["hf", "deepspeed", "universal"]
    export.add_argument("--format", choices=kinds, default="hf", help="hf: the weights; the others: the optimizer's state too")
    export.add_argument("--zero", type=int, choices=[1, 2, 3], help="deepspeed: the ZeRO stage that will load it")
    export.add_argument("--ranks", type=int, help="deepspeed: the number of processes that will load it")
    export.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="of the weights (hf: default as stored)")
    export.add_argument("--tokenizer", type=Path, help="hf: a tokenizer.json, or a folder with one; default: the run's own")
    export.add_argument("--shard-size", help="hf: most bytes of a file, as 500MB or 2GB (default: 5GB)")
    export.add_argument("--family", help="hf: the model_type to export as (default: as imported, or the first that fits)")
    bring = command("import", _import, "make a checkpoint out of a Hugging Face, DeepSpeed or PyTorch DCP folder")
    bring.add_argument("source", type=Path)
    bring.add_argument("output", help="a folder of checkpoints; the new one becomes its newest step")
    bring.add_argument("--format", choices=["hf", "deepspeed", "dcp"], help="default: told by the files in the folder")
    bring.add_argument("--tokenizer", type=Path, help="the model's tokenizer.json (default: the one in the folder)")
    _add_overwrite(bring)
    mean = command(
        "average", _average, "the mean of the weights of several steps, as a checkpoint to evaluate, export or go on from"
    )
    mean.add_argument("sources", nargs="+", help="steps of one model; with --last, a run")
    mean.add_argument("--output", required=True, help="a folder of checkpoints; a run begins from it with resume=<folder>")
    mean.add_argument("--last", type=int, help="take so many of the newest complete steps of the run")
    mean.add_argument(
        "--weights", type=float, nargs="+", help="of the steps, in any unit (default: alike); newest first with --last"
    )
    _add_overwrite(mean)
    copies = command(
        "upcycle", _upcycle, "make a mixture of experts out of a dense model: each expert a copy of a feed-forward"
    )
    copies.add_argument("source", help="a step, a run (its newest step) or an import, of a dense model")
    copies.add_argument("output", help="a folder of checkpoints; a run begins from it with resume=<folder>")
    copies.add_argument("experts", nargs="+", metavar="key=value", help="keys of model.experts, as count=8 top_k=2")
    copies.add_argument(
        "--noise", type=float, default=0.0, help="of the copies, over the weight's root mean square (default: 0)"
    )
    copies.add_argument("--seed", type=int, default=0, help="of noise and routers (default: 0)")
    _add_overwrite(copies)
    return parser


def _add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace the step if the output has it (default: refuse)")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError


def _list(arguments: argparse.Namespace) -> int:
    from ..checkpoint.folder import open_step, step_folders

    damaged = 0
    for files in step_folders(arguments.path, listing=True):
        try:
            manifest = open_step(files)
            print(f"{files.label()}  step {manifest.step}  {_size(manifest.bytes)}  {counted(manifest.world_size, 'rank')}")
        except CheckpointError as error:
            damaged += 1
            print(f"{files.label()}  {'can not be read' if isinstance(error, UnreadableError) else 'damaged'}: {error}")
    return 1 if damaged else 0


def _inspect(arguments: argparse.Namespace) -> int:
    from ..checkpoint.folder import load_manifest, step_folders
    from ..checkpoint.tools import summary

    files = step_folders(arguments.path)[0]
    found: Any = summary(files)
    if arguments.state:
        print(json.dumps(found["state"], indent=2))
        return 0
    print(
        f"{found['path']}: step {found['step']}, {_size(found['bytes'])}, saved by {counted(found['saved_by_ranks'], 'rank')}"
    )
    for name, size in found["files"].items():
        print(f"  {name}  {_size(size)}")
    for role, counts in sorted(found["roles"].items()):
        print(f"  {role}: {counts['arrays']} arrays, {counts['elements']:,} elements, {_size(counts['bytes'])}")
    print(f"  state: {', '.join(sorted(found['state']))}")
    if arguments.arrays:
        manifest = load_manifest(files)
        for key, array in manifest.arrays.items():
            print(f"  {key}  {array.dtype}{list(array.shape)}  {manifest.count_boxes(array)} boxes")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from ..checkpoint.folder import step_folders
    from ..checkpoint.tools import verify

    bad = 0
    for files in step_folders(arguments.path, listing=True):
        start, blocks, count, faults = time.perf_counter(), 0, 0, 0
        total = _stored_bytes(files)
        with progress(f"verifying {files.label()}") as advance:
            for found in verify(files):
                if isinstance(found, int):
                    blocks, count = blocks + 1, count + found
                    advance(count, total)
                else:
                    faults += 1
                    print(f"{'UNREADABLE' if isinstance(found, UnreadableError) else 'DAMAGED'} {found}")
        took = time.perf_counter() - start
        verdict = f"{faults} faults" if faults else "every block is as written"
        print(f"{files.label()}: {blocks} blocks, {_size(count)} good in {took:.1f} s; {verdict}")
        bad += faults
    return 1 if bad else 0


def _stored_bytes(files: Files) -> int:
    """Return the bytes that the manifest of a step counts; 0 for one that can't be read."""
    from ..checkpoint.folder import open_manifest

    try:
        return sum(file.bytes for file in open_manifest(files).files)
    except CheckpointError:
        return 0


def _diff(arguments: argparse.Namespace) -> int:
    from ..checkpoint.folder import step_folders
    from ..checkpoint.reading.compare import diff

    count = 0
    for found in diff(step_folders(arguments.one)[0], step_folders(arguments.other)[0]):
        count += 1
        detail = f": {found.elements:,} elements, by up to {found.largest:.6g}" if found.elements else ""
        print(f"{found.key}  {found.what}{detail}")
    print(f"{count} arrays differ" if count else "no array differs")
    return 1 if count else 0


def _prune(arguments: argparse.Namespace) -> int:
    from ..checkpoint.tools import prune

    for name in prune(arguments.path, arguments.keep):
        print(f"deleted {name}")
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    from ..checkpoint.tools import saves

    columns = {
        "stall_seconds": "stall s",
        "staging_seconds": "staging s",
        "hashing_seconds": "hashing s",
        "writing_seconds": "writing s",
        "commit_seconds": "commit s",
        "total_seconds": "total s",
    }
    print(f"{'step':>9} {'outcome':<9} " + " ".join(f"{title:>9}" for title in columns.values()) + f" {'GB/s':>6} {'GiB':>8}")
    faults = 0
    for save in saves(arguments.path):
        values: Any = save
        try:
            times = " ".join(f"{values[key]:>9.3f}" for key in columns)
            tail = f" {values['gigabytes_per_second']:>6.2f} {values['total_bytes'] / 2**30:>8.3f}"
            reason = f"  {values['reason']}" if values["reason"] else ""
            print(f"{values['step']:>9} {values['outcome']:<9} {times}{tail}{reason}")
        except (KeyError, TypeError, ValueError):
            faults += 1
    if faults:
        print(f"meshloom checkpoint stats: {faults} lines are none of a save", file=sys.stderr)
    return 1 if faults else 0


def _export(arguments: argparse.Namespace) -> int:
    from ..checkpoint.convert.deepspeed_export import export_ranks, export_universal
    from ..checkpoint.convert.hugging_face.exporting import SHARD_BYTES, export
    from ..checkpoint.folder import step_folders

    files = step_folders(arguments.path)[0]
    ranks, zero = arguments.ranks, arguments.zero
    given = [value for value in (ranks, zero) if value is not None]
    if len(given) != (2 if arguments.format == "deepspeed" else 0):
        raise CheckpointError("--zero and --ranks go with --format deepspeed, both: rank files are for one stage and number")
    if arguments.tokenizer is not None and arguments.format != "hf":
        raise CheckpointError("--tokenizer goes with --format hf")
    if arguments.shard_size is not None and arguments.format != "hf":
        raise CheckpointError("--shard-size goes with --format hf")
    if arguments.family is not None and arguments.format != "hf":
        raise CheckpointError("--family goes with --format hf")
    if arguments.dtype is not None and arguments.format == "universal":
        raise CheckpointError("--dtype does not go with --format universal, which holds fp32 alone")
    with _shown(f"writing {arguments.output}"):
        if arguments.format == "universal":
            folder = export_universal(files, arguments.output)
        elif arguments.format == "deepspeed":
            folder = export_ranks(files, arguments.output, stage=zero, ranks=ranks, dtype=arguments.dtype)
        else:
            size = SHARD_BYTES if arguments.shard_size is None else _bytes(arguments.shard_size)
            options: dict[str, Any] = {"dtype": arguments.dtype, "tokenizer": arguments.tokenizer, "family": arguments.family}
            folder = export(files, arguments.output, **options, shard_bytes=size)
    print(f"{files.label()} → {folder}")
    return 0


@contextlib.contextmanager
def _shown(title: str) -> Generator[None]:
    """Show how far the conversion within the block has come."""
    from ..checkpoint.convert.progress import listening

    with progress(title) as advance, listening(advance):
        yield


def _bytes(written: str) -> int:
    """Read a size as transformers writes it: GB is 10^9 bytes, GiB 2^30."""
    units = {"": 1} | {f"{letter}{mark}": base**power for power, letter in enumerate("KMGT", 1) for mark, base in _UNITS}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", written)
    if match is None or match[2].removesuffix("B") not in units or float(match[1]) <= 0:
        raise CheckpointError(f"--shard-size {written!r} is no size; write 500MB or 2GB")
    return int(float(match[1]) * units[match[2].removesuffix("B")])


_UNITS = (("", 1000), ("i", 1024))


def _import(arguments: argparse.Namespace) -> int:
    from ..checkpoint.convert.detect import bring_in

    with _shown(f"writing {arguments.output}"):
        made = bring_in(
            arguments.source, arguments.output, arguments.format, arguments.tokenizer, overwrite=arguments.overwrite
        )
    print(f"{arguments.source} → {made}")
    return 0


def _average(arguments: argparse.Namespace) -> int:
    from ..checkpoint.convert.average import average
    from ..checkpoint.folder import step_folders

    if arguments.last is None:
        steps = [step_folders(source)[0] for source in arguments.sources]
    else:
        if len(arguments.sources) > 1:
            raise CheckpointError("--last goes with one run")
        there = step_folders(arguments.sources[0])
        if not 2 <= arguments.last <= len(there):
            raise CheckpointError(
                f"--last {arguments.last}: the run has {counted(len(there), 'complete step')}, and two are needed"
            )
        steps = there[: arguments.last]
    with _shown(f"writing {arguments.output}"):
        made = average(steps, arguments.output, arguments.weights, overwrite=arguments.overwrite)
    print(f"{', '.join(files.label() for files in steps)} → {made}")
    return 0


def _upcycle(arguments: argparse.Namespace) -> int:
    from ..checkpoint.convert.upcycle import upcycle
    from ..checkpoint.folder import step_folders

    experts = _experts(arguments.experts)
    files = step_folders(arguments.source)[0]
    with _shown(f"writing {arguments.output}"):
        made = upcycle(
            files, arguments.output, experts, noise=arguments.noise, seed=arguments.seed, overwrite=arguments.overwrite
        )
    print(f"{files.label()} → {made}")
    return 0


def _experts(words: Sequence[str]) -> ExpertsConfig:
    """Read keys of `model.experts`, written as on the command line of a run. Raises ConfigError with every problem."""
    from omegaconf import OmegaConf

    from ..config.nodes import typed_option
    from ..config.overrides import is_plain, key_of, parse_overrides
    from ..models.mixture.config import ExpertsConfig

    group, node, problems = "model.experts", OmegaConf.create(), list[Problem]()
    for each in parse_overrides([f"{group}.{word.removeprefix(f'{group}.')}" for word in words], None, problems):
        if is_plain(each):
            OmegaConf.update(node, key_of(each).removeprefix(f"{group}."), each.value())
        else:
            problems.append(Problem(each.input_line or "", "is not one value of a key", "write key=value"))
    if problems:
        raise ConfigError(problems)
    return typed_option(ExpertsConfig, cast(Any, OmegaConf.to_container(node)), group)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
