"""Words of messages."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number with its noun in singular or plural: '1 run', '2,000 runs', '2 processes'."""
    plural = noun if number == 1 else f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"
    return f"{number:,} {plural}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; where it has none, the name of its class."""
    return next(filter(None, str(error).splitlines()), type(error).__name__)
