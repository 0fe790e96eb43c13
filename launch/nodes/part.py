"""The part of a machine in a run on several."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FLAG = "--machine="
"""Of the agent's command line: its part in a run, JSON."""
OWN_WORDS = re.compile(r"--|launch\.|(\w+\.)*(\w*(dir|folder|path)|input|validation)=")
"""Words in which machines may differ: how each is reached, and where files lie there."""


@dataclass(frozen=True)
class Rules:
    """Rules of a run for its machines.

    processes     of each machine
    most          the largest number of them
    placements    number of machines → overrides for it; numbers that are missing are not run on
    max_restarts  launch.max_restarts, as a number
    join_seconds  launch.join_seconds
    """

    processes: int
    most: int
    placements: Mapping[int, Sequence[str]]
    max_restarts: int = 3
    join_seconds: float = 30.0

    def size(self, count: int) -> int:
        """Return on how many of so many machines the run goes on; 0: they are too few."""
        return max((number for number in self.placements if number <= count), default=0)


RULES = {"processes": "launch.nproc", "most": "launch.nodes (at most)", "max_restarts": "launch.max_restarts"}
"""Rules that have to be alike → the keys that say them. Of the others those of the machine that leads hold."""


@dataclass(frozen=True)
class Part:
    """A machine's part in a run. output_dir: of the run, absolute; arguments: of every rank; address: launch.address."""

    output_dir: str
    rules: Rules
    arguments: Sequence[str]
    address: str = "auto"

    @property
    def common(self) -> dict[str, Any]:
        """The things that all machines of a run have to have alike: the rules, and the words that say what is computed."""
        words = sorted(word.lstrip("+") for word in self.arguments if not OWN_WORDS.match(word.lstrip("+")))
        return {"rules": {name: getattr(self.rules, name) for name in RULES}, "words": words}

    def as_word(self) -> str:
        """Return it as a word of the agent's command line."""
        return FLAG + json.dumps(asdict(self))

    @classmethod
    def from_word(cls, word: str) -> Part:
        """Read what `as_word` has given."""
        values: dict[str, Any] = json.loads(word.removeprefix(FLAG))
        rules: dict[str, Any] = values["rules"]
        rules["placements"] = {int(number): words for number, words in rules["placements"].items()}
        return cls(values["output_dir"], Rules(**rules), values["arguments"], values["address"])


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return in what another machine's `Part.common` differs from this one's; "" where they are alike."""
    for name, value in here["rules"].items():
        if there["rules"].get(name) != value:
            return f"{RULES[name]}={there['rules'].get(name)}, and the run {value}"
    only_there = [word for word in there["words"] if word not in here["words"]]
    only_here = [word for word in here["words"] if word not in there["words"]]
    if not only_there and not only_here:
        return ""
    return f"{' '.join(only_there) or 'nothing'} on its command line, and the run {' '.join(only_here) or 'nothing'}"


def overlaid(words: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Return the words of a command line with these changes in the place of words that set the same keys."""
    changed = {_key(word) for word in changes}
    return [*(word for word in words if _key(word) not in changed), *changes]


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")
