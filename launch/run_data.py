"""The data of a run that a command line or a checkpoint describes, prepared as the run would have it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config.overrides import quoted
from ..config.problems import ConfigError, Problem
from .exit_codes import BAD_CONFIG
from .switches import read_switches

if TYPE_CHECKING:
    from ..data.batch import Samples
    from ..data.node import DataNode
    from ..trainer.resolve import ResolvedRun


@dataclass(frozen=True)
class RunData:
    """Prepared data of a run, or of one of its stages."""

    run: ResolvedRun
    node: DataNode

    @property
    def title(self) -> str:
        """Name of the data's kind and of the stage that reads it."""
        place = self.run.place
        return f"{self.run.config.data.name}" + ("" if place is None else f", stage {place.stage.name}")

    @property
    def first_sample(self) -> int:
        """Number, in the run, of the first training sample of these data."""
        place = self.run.place
        return 0 if place is None else place.origin("data").samples

    def refuse_other_stages(self, number: int) -> None:
        """Raise ConfigError for a training sample that the run reads in a stage with other data than these."""
        place, first = self.run.place, self.first_sample
        if place is None:
            return
        if number < first:
            message = f"sample {number:,} was read in a stage with other data, which ended before sample {first:,}"
            raise ConfigError([Problem("--sample", message, f"count from {first:,}, or give a checkpoint of that stage")])
        other = next((run.place.stage for run in self.run.then if run.place is not None and run.place.begins("data")), None)
        if other is None:
            return
        end = first - (place.origin("data").tokens - other.begin) // self.run.config.data.seq_len
        if number >= end:
            message = f"sample {number:,} is read in {other.key} or later, whose data follow from what was read before"
            fix = f"give a number below {end:,}, or checkpoint=… of a step in that stage"
            raise ConfigError([Problem("--sample", message, fix)])

    def train(self) -> Samples:
        """Return the endless training samples, those left out by rewinds of its checkpoint among them as the run has them."""
        from ..checkpoint.restore import read_state
        from ..data.samples.left_out import LeftOut
        from ..trainer.build import training_samples
        from ..trainer.guard.journal import Journal, read_journal

        samples, checkpoint = training_samples(self.node, self.run.place), self.run.checkpoint
        if checkpoint is None:
            return samples
        journal = Journal(self.node.fingerprint)
        journal.add([*read_state(checkpoint).get("rewinds", []), *read_journal(checkpoint)])
        return LeftOut(samples, journal.is_left_out)


def read_run(words: Sequence[str]) -> ResolvedRun:
    """Resolve `key=value` words, as of `meshloom train`; checkpoint=… takes the recipe of that. Raises ConfigError."""
    from ..trainer.find_checkpoint import find_checkpoint
    from ..trainer.resolve import ResolveOptions, resolve

    switches, _ = read_switches(words)
    keys: list[str] = []
    for word in switches.overrides:
        name, _, value = word.partition("=")
        keys.append(f"resume={quoted(str(find_checkpoint(value, 'checkpoint')))}" if name == "checkpoint" else word)
    resolved = resolve(keys, ResolveOptions(lambda _: 0, builds=lambda _: False), switches.config_dir)
    resolved.refuse()
    return resolved


def prepared_run(run: ResolvedRun) -> RunData:
    """Prepare the data of a run. Raises ConfigError for data that can't be read."""
    from ..trainer.run import prepared_data

    return RunData(run, prepared_data(run.config.data, run.config.seed, run.config.model.vocabulary))


def whole_number(text: str) -> int:
    """Read an option's value, 0 or more."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number")
    return int(text)


def view_parser(name: str, about: str) -> argparse.ArgumentParser:
    """Return a parser for a command's own options, beside which it takes `key=value` words. about: its module's docstring."""
    words = "key=value …: the run, as of meshloom train; checkpoint=<a run's folder or a step's> takes the recipe of that"
    return argparse.ArgumentParser(name, description=about.partition("\n")[0], epilog=words, allow_abbrev=False)


def run_view(
    parser: argparse.ArgumentParser, words: Sequence[str], view: Callable[[argparse.Namespace, ResolvedRun], None]
) -> int:
    """Read a command's own options and the run's words, and show something. Return the exit code."""
    from ..checkpoint.errors import CheckpointError
    from ..data.shards.manifest import ShardError

    try:
        own, rest = parser.parse_known_args(list(words))
        view(own, read_run(rest))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    except SystemExit as ended:  # of argparse: help, or a bad option
        return int(ended.code or 0)
    except BrokenPipeError:  # of `| head`, which the command line knows
        raise
    except (CheckpointError, ShardError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0
