"""Keys of mappings on their way through JSON, by the types that the fields declare."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from meshloom.config.structured import with_declared_keys, with_text_keys


@dataclass(frozen=True)
class Inner:
    """A nested config."""

    by_number: dict[int, Any] | None = None


@dataclass(frozen=True)
class Outer:
    """A config with a mapping of each kind."""

    by_number: dict[int, Any]
    by_name: dict[str, Any]
    inner: Inner = field(default_factory=Inner)
    number: int = 3


@dataclass(frozen=True)
class Unsupported:
    """A config that JSON would change without a word."""

    by_truth: dict[bool, Any]


def test_numbers_as_keys_survive_json() -> None:
    config = Outer({2: ["a"], 10: {5: "left as it is"}}, {"2": "a name"}, Inner({7: None}))
    values = dataclasses.asdict(config)
    through = json.loads(json.dumps(with_text_keys(Outer, values)))
    assert through["by_number"].keys() == {"2", "10"} and through["inner"]["by_number"].keys() == {"7"}
    back = with_declared_keys(Outer, through)
    assert back == {**values, "by_number": {2: ["a"], 10: {"5": "left as it is"}}}


def test_values_of_older_versions_are_left_alone() -> None:
    older = {"gone": {"1": 2}, "by_name": {"1": 2}, "inner": None}
    assert with_declared_keys(Outer, older) == older


def test_keys_that_json_can_not_give_back_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Unsupported\.by_truth: keys of bool"):
        with_text_keys(Unsupported, {"by_truth": {True: 1}})
