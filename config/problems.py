"""Problems of a config: each has a key, a message and a fix; all are reported at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .words import counted


@dataclass(frozen=True)
class Problem:
    """A problem that the user must fix: the config key, what is wrong with it, and a fix.

    unless  other keys that would mend it: it is not reported where one of them has a problem of its own
    lacks   the package that is not installed here, if that is the problem: other machines may have it
    """

    key: str
    message: str
    fix: str = ""
    unless: tuple[str, ...] = ()
    lacks: str = ""

    def __str__(self) -> str:
        named = self.message if self.message.startswith(self.key) else f"{self.key}: {self.message}"
        return named + (f"; {self.fix}" if self.fix else "")


class ConfigError(ValueError):
    """Raised for a config that can't run, with every problem found, not only the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        head = f"{counted(len(self.problems), 'problem')} in the config:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Problem]]]:
        """Pickle the problems: a rank may pass them on to others."""
        return type(self), (self.problems,)
