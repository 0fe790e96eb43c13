"""Stages as a recipe writes them: a length in tokens for each, and what it changes from the stage before it.

    stages:
      base: {tokens: 8B}
      long: {tokens: 1B, data: {seq_len: 65536}, model: {rope_theta: 8_000_000}}
      anneal: {tokens: 500M, schedule: {name: linear, warmup: 0}}

A change is a word of the command line, written as a tree: `schedule: linear` chooses an option, as `schedule=linear` does.
Changes add up: `anneal` above still has the sequences of `long`.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ...config.duration import Duration
from ...config.overrides import normalize_override, quoted
from ...config.problems import Problem

NAME = re.compile(r"[A-Za-z][\w-]*")
FORM = "write a name and a length for each: stages: {base: {tokens: 8B}, anneal: {tokens: 1B, optim: {lr: 1e-4}}}"
OF_THE_RUN = (
    *("recipe", "output_dir", "resume", "seed", "precision", "stages", "trainer.steps", "trainer.tokens", "launch"),
    *("checkpoint.folder", "checkpoint.snapshot_folder", "checkpoint.strict"),
)
"""Keys, and groups, that no stage may name."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    number   its place among the stages, from 0
    begin    tokens of the run at which it begins; a stage before it may end up to a step later
    end      tokens of the run that end it, with the step that reaches them
    changes  key as written on the command line → its value in this stage
    """

    name: str
    number: int
    begin: int
    end: int
    changes: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The key of this stage."""
        return f"stages.{self.name}"

    @property
    def words(self) -> list[str]:
        """The changes as words of a command line."""
        return [normalize_override(f"{key}={written_value(value)}") for key, value in self.changes.items()]

    def names(self, group: str) -> bool:
        """Return whether the stage changes a group, or a key of it."""
        return any(key == group or key.startswith(f"{group}.") for key in self.changes)

    def touches(self, key: str) -> bool:
        """Return whether a key is one that the stage changes, inside one, or above one."""
        return any(key == each or key.startswith(f"{each}.") or each.startswith(f"{key}.") for each in self.changes)


def read_stages(written: Any) -> tuple[list[Stage], list[Problem]]:
    """Return the stages that a config writes, and what is wrong with them. There are none where a name or length is wrong.

    written: `stages` of a config, in plain containers
    """
    if not written:
        return [], []
    if not isinstance(written, Mapping):
        return [], [Problem("stages", f"{written!r} is no mapping of stages", FORM)]
    stages, problems, begin = list[Stage](), list[Problem](), 0
    for name, node in cast(Mapping[Any, Any], written).items():
        key = f"stages.{name}"
        if not NAME.fullmatch(str(name)):
            problems.append(Problem(key, f"'{name}' is no name", "begin with a letter, and use letters, digits, _ and -"))
        elif not isinstance(node, Mapping):
            problems.append(Problem(key, f"{node!r} is no stage", FORM))
        else:
            values = dict(cast(Mapping[str, Any], node))
            try:
                tokens = _tokens(values.pop("tokens", None))
            except ValueError as error:
                problems.append(Problem(f"{key}.tokens", str(error), f"give its length: {key}.tokens=1B"))
                tokens = 0
            changes = dict(_flat(values))
            problems += (fixed := list(_fixed(key, changes)))
            changes = {name: value for name, value in changes.items() if f"{key}.{name}" not in {each.key for each in fixed}}
            stages.append(Stage(str(name), len(stages), begin, begin + tokens, changes))
            begin += tokens
    lengths = len(stages) == len(cast(Mapping[Any, Any], written)) and all(stage.end > stage.begin for stage in stages)
    return stages if lengths else [], problems


def _tokens(written: Any) -> int:
    """Read the length of a stage. A number without a unit counts tokens. Raises ValueError."""
    if written is None:
        raise ValueError("the stage has no length")
    if isinstance(written, bool) or not isinstance(written, int | float | str):
        raise ValueError(f"{written!r} is no number of tokens")
    text = str(written).strip()
    try:
        length = Duration.parse(text if text.lower().endswith(("token", "tokens")) else f"{text} tokens")
    except ValueError:
        raise ValueError(f"'{written}' is no number of tokens") from None
    if not 1 <= length.value < math.inf or length.value != int(length.value):
        raise ValueError(f"'{written}' is no whole number of tokens above 0")
    return int(length.value)


def _fixed(key: str, changes: Mapping[str, Any]) -> Iterator[Problem]:
    for name in changes:
        if any(name == each or name.startswith(f"{each}.") for each in OF_THE_RUN):
            fix = "the length of a stage is its tokens" if name.startswith("trainer.") else "set it outside of the stages"
            yield Problem(f"{key}.{name}", "is of the whole run, and no stage changes it", fix)


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(cast(Mapping[str, Any], value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def written_value(value: Any) -> str:
    """Write a value so that Hydra reads back the same. Keys of dictionaries stand as they are: Hydra has no quotes for them."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(written_value, cast(list[Any], value)))}]"
    if isinstance(value, Mapping):
        pairs = cast(Mapping[str, Any], value).items()
        return f"{{{','.join(f'{name}:{written_value(each)}' for name, each in pairs)}}}"
    if isinstance(value, str):
        return value if reads_as_text(value) else quoted(value)
    return repr(value)


def reads_as_text(text: str) -> bool:
    """Return whether Hydra reads back this text where it stands without quotes."""
    return re.fullmatch(r"[\w.-]+", text, re.ASCII) is not None and not _reads_as_another(text)


def _reads_as_another(text: str) -> bool:
    """Return whether Hydra takes a text without quotes for a number, true, false or null."""
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return text.lower() in ("null", "true", "false")


def stage_table(stages: Sequence[Stage], current: int) -> Iterator[str]:
    """Yield lines that show the stages of a run: where each ends, and what it changes. The current one is marked."""
    width = max(len(stage.name) for stage in stages)
    ends = [f"{stage.end:,}" for stage in stages]
    lengths = [f"{stage.end - stage.begin:,}" for stage in stages]
    wide, long = max(map(len, ends)), max(map(len, lengths))
    yield f"{len(stages)} stages, {stages[-1].end:,} tokens:"
    for stage, end, length in zip(stages, ends, lengths, strict=True):
        mark = ">" if stage.number == current else " "
        changes = "  ".join(stage.words) or "-"
        yield f"{mark} {stage.name:<{width}}  {length:>{long}} tokens, to {end:>{wide}}  {changes}"
