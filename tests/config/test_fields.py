"""No key of the config is there for nobody: each is read by code outside of config/, or taken by the class it configures."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from functools import cache
from pathlib import Path

import pytest
from hydra.utils import get_class

from meshloom.parallel.deepspeed.settings import DeepSpeedConfig
from meshloom.trainer.schema import OPTIONS, RunConfig

ROOT = Path(__file__).parents[2]
CODE = ["models", "optim", "data", "parallel", "checkpoint", "planner", "trainer", "launch"]
OWN = {"_target_", "_recursive_", "name"}  # Hydra's; `name` tells options apart for people and for the checkpoint


# A function that is given one group alone calls it `config`.
GIVEN_ALONE: dict[str, str | tuple[str, ...]] = {
    "checkpoint": "checkpoint/",
    "logging": "trainer/hooks/loggers/",
    "parallel": "parallel/layout.py",
    "balance": "parallel/experts/",
    "tasks": ("trainer/tasks/", "trainer/hooks/tasks.py"),
}
READ_AS = {("balance", "global_batch"): "global_coefficient"}
"""Key → the property of its config through which it is read."""


@cache
def attributes_read() -> frozenset[tuple[str, str, str]]:
    """(file, what it is read of, attribute), for every attribute that the code outside of config/ reads; last names alone."""
    found: set[tuple[str, str, str]] = set()
    for path in (path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                last = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
                found.add((str(path.relative_to(ROOT)), last.lstrip("_"), node.attr))
    return frozenset(found)


@cache
def words() -> frozenset[str]:
    """Every string in the code that builds optimizers, schedules and controllers from their nodes, and in the trainer."""
    paths = [ROOT / "optim" / "build.py", *(ROOT / "trainer").glob("*.py")]
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text())))
    return frozenset(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


TYPED = {
    (group, field.name)
    for group, hint in typing.get_type_hints(RunConfig).items()
    if dataclasses.is_dataclass(hint) and group not in OPTIONS
    for field in dataclasses.fields(hint)
} | {("deepspeed", field.name) for field in dataclasses.fields(DeepSpeedConfig)}


@pytest.mark.parametrize(("group", "field"), sorted(TYPED), ids=lambda value: value)
def test_every_key_of_a_typed_group_is_read(group: str, field: str) -> None:
    alone, field = GIVEN_ALONE.get(group), READ_AS.get((group, field), field)
    assert any(
        name == field and (owner == group or (alone is not None and owner == "config" and file.startswith(alone)))
        for file, owner, name in attributes_read()
    )


def test_every_key_of_the_run_is_read() -> None:
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    read = {attribute for _, owner, attribute in attributes_read() if owner in ("config", "parts")}
    assert fields <= read


def schemas() -> list[type]:
    """The typed form of every option of the groups that are built by their `_target_`."""
    return [kind for kinds in OPTIONS.values() for kind in kinds]


def parameters(target: type) -> set[str]:
    """The names that a class's constructor and those that it hands its keywords on to take."""
    names: set[str] = set()
    for kind in target.__mro__:
        if "__init__" not in vars(kind) or kind.__module__.startswith(("torch", "builtins")):
            continue
        signature = inspect.signature(kind.__init__)
        names |= {name for name, parameter in signature.parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    return names


@pytest.mark.parametrize("schema", schemas(), ids=lambda schema: schema.__name__)
def test_every_key_of_an_option_is_an_argument_of_its_class(schema: type) -> None:
    target = next(field.default for field in dataclasses.fields(schema) if field.name == "_target_")
    keys = {field.name for field in dataclasses.fields(schema)} - OWN
    taken = parameters(get_class(typing.cast(str, target)))
    # Keys that the class does not take are read from the node before the class is built.
    assert keys - taken <= {name for _, _, name in attributes_read()} | words()
