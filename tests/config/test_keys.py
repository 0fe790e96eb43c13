"""Every key is declared once, with a side and a meaning, and read off there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from meshloom.config.keys import MISSING, RecipeWhen, Side, key, keys_of
from meshloom.trainer.schema import group_keys, groups


@dataclass
class Inner:
    SIDE: ClassVar[Side] = Side.HABIT
    words: list[str] = key(["a"], "some words")


@dataclass
class Outer:
    SIDE: ClassVar[Side] = Side.RECIPE
    size: int | None = key(MISSING, "the size", Side.PLACEMENT)
    rest: Any = key(1.5, "the rest")
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize("group", groups())
def test_every_key_has_a_side_and_a_meaning(group: str) -> None:
    found = list(group_keys(group))  # raises for a key without
    assert found and all(len(one.key.meaning) > 5 for one in found)


def test_a_key_without_a_side_or_a_meaning_is_refused() -> None:
    @dataclass
    class NoSide:
        size: int = key(1, "the size")

    @dataclass
    class NoMeaning:
        SIDE: ClassVar[Side] = Side.RECIPE
        size: int = 1

    for kind in (NoSide, NoMeaning):
        with pytest.raises(TypeError, match="size: declare it with key"):
            list(keys_of(kind))


def test_keys_are_read_off_their_declaration() -> None:
    found = [(one.name, one.type, one.default, one.side) for one in keys_of(Outer)]
    assert found == [
        ("size", "int | null", "???", Side.PLACEMENT),
        ("rest", "any", 1.5, Side.RECIPE),
        ("inner.words", "list[str]", ["a"], Side.HABIT),
    ]
    assert Inner().words is not Inner().words


def test_a_side_may_depend_on_a_choice() -> None:
    side = RecipeWhen("odd runs", lambda run: run % 2 == 1)
    assert side.of(1) is Side.RECIPE and side.of(2) is Side.PLACEMENT
    assert str(side) == "placement; recipe under odd runs"
