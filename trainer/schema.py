"""The typed config of a whole run, and its registration with Hydra. Each group's dataclass is in the folder it configures."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..checkpoint.config import CheckpointConfig
from ..config.keys import MISSING, Key, Side, key, keys_of
from ..config.precision import PRECISIONS
from ..config.problems import Problem
from ..data import config as data
from ..models import config as models
from ..models.mixture.balance_config import BalanceConfig
from ..optim.batch import config as batch
from ..optim.batch.config import FITTED
from ..optim.optimizers.config import OptimConfig
from ..optim.optimizers.options import OPTIONS as OPTIM_OPTIONS
from ..optim.schedules import config as schedules
from ..parallel.config import ParallelConfig
from ..parallel.layout import island_count
from .config import TrainerConfig
from .hooks.loggers.config import LoggingConfig
from .launching import LaunchConfig, full_processes
from .tasks.config import TasksConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ..config.compose import Composer

OPTIONS: dict[str, tuple[type, ...]] = {
    "model": models.OPTIONS,
    "data": data.OPTIONS,
    "optim": OPTIM_OPTIONS,
    "schedule": schedules.OPTIONS,
    "batch": batch.OPTIONS,
}
"""Group → the schemas of its options. A group's class may also be one of the user's own (`_target_`)."""


@dataclass(frozen=True)
class RunConfig:
    """The whole config of a run. It is never changed: `replace_keys` of `typed.py` makes another one.

    A group with options has the dataclass of its option, or the group's `Custom…` for a class of the user's own. A group
    with values of wrong types is None until the run is refused; `unusable` names these, and no check reads them.
    """

    SIDE: ClassVar[Side] = Side.RECIPE

    recipe: str = key(MISSING, "the recipe to start from; it names the run")
    output_dir: str = key("outputs/${recipe}", "folder of the run: metrics, config, checkpoints", Side.PLACEMENT)
    seed: int = key(1, "what initial weights and the order of the data are drawn from")
    precision: str = key("bf16", "what the model computes in: fp32, bf16 or fp64; masters are at least fp32")
    resume: str = key(
        "none",
        "none; auto: go on from the run's newest complete checkpoint, if there is one; the path of any checkpoint; hf:<folder>:"
        " from a model folder of Hugging Face; auto:<path>: as auto, and where the run has saved nothing yet, from that path",
        Side.PLACEMENT,
    )
    stages: dict[str, Any] = key(
        {},
        "name → a stage: its length in tokens, and what it changes from the stage before it, as a tree of keys;"
        " {}: the run has one, as long as trainer.steps or trainer.tokens says",
    )
    validation: dict[str, Any] = key(
        {},
        "name → node of any option of data (`/data@validation.wiki: text` in a recipe's defaults): a validation set, read whole"
        " and evaluated apart as validation/<name>/loss",
    )
    model: models.ModelConfig = MISSING
    data: data.DataConfig = MISSING
    optim: OptimConfig = MISSING
    schedule: schedules.ScheduleConfig = MISSING
    batch: batch.BatchConfig = MISSING
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def problems(self) -> list[Problem]:
        """Return the problems of the run's own values and of every group, each checked by itself."""
        found = list(self._own_problems())
        for name in groups():
            if name and name not in self.unusable:
                found += vars(self)[name].problems(name)
        return found

    @property
    def unusable(self) -> frozenset[str]:
        """Groups that have no dataclass, because their values have wrong types or are missing."""
        return frozenset(name for name, group in vars(self).items() if group is None)

    @property
    def left_to_laws(self) -> list[str]:
        """Keys whose values a scaling law has still to decide."""
        values = {"batch.samples": self.batch and self.batch.samples, "optim.lr": self.optim and self.optim.lr}
        return [name for name, value in values.items() if isinstance(value, str)]

    def islands_on(self, processes: int) -> int:
        """Return how many islands (`optim.local`) so many processes make. Those of lost machines are not there."""
        return island_count(self.optim.local, self.parallel, processes, full_processes(self.launch, processes))

    @property
    def left_to_plan(self) -> list[str]:
        """Keys whose values a plan has still to decide, by what fits."""
        values = {"batch.micro": self.batch and self.batch.micro, "trainer.activation": self.trainer.activation}
        return [name for name, value in values.items() if value == FITTED]

    def _own_problems(self) -> Iterator[Problem]:
        if self.precision not in PRECISIONS:
            yield Problem("precision", f"there is no '{self.precision}'", f"use {', '.join(PRECISIONS)}")
        if not 0 <= self.seed < 2**63:
            yield Problem("seed", f"{self.seed} is no seed", "use 0 up to less than 2^63")
        if not str(self.output_dir).strip():
            yield Problem("output_dir", "is empty", "give a folder")
        if "://" in str(self.output_dir):
            fix = "give a folder, and the URL as checkpoint.folder: checkpoints may go there"
            yield Problem("output_dir", f"'{self.output_dir}' is a URL, and metrics are written to a folder", fix)
        if not self.resume:
            yield Problem("resume", "is empty", "use auto, none, or the path of a checkpoint")


@dataclass(frozen=True)
class GroupKey:
    """A key of a group, of all the options that declare it alike.

    group     "" for the run's own keys
    options   name of the option → its default; of a group without options, "" → the default
    everywhere  whether every option of the group has it
    """

    group: str
    key: Key
    options: dict[str, Any]
    everywhere: bool

    @property
    def name(self) -> str:
        """The key as written on the command line."""
        return f"{self.group}.{self.key.name}" if self.group else self.key.name


def groups() -> dict[str, tuple[type, ...]]:
    """Return group → its dataclasses: one, or one per option. "" stands for the run's own keys."""
    hints = typing.get_type_hints(RunConfig)
    found: dict[str, tuple[type, ...]] = {"": (RunConfig,)}
    for name, hint in hints.items():
        if name in OPTIONS:
            found[name] = OPTIONS[name]
        elif dataclasses.is_dataclass(hint):
            found[name] = (typing.cast(type, hint),)
    return found


def group_keys(group: str) -> Iterator[GroupKey]:
    """Yield every key of a group; one that several options declare alike, once."""
    kinds = groups()[group]
    if not group:
        own = [one for one in dataclasses.fields(RunConfig) if one.metadata]
        names = {one.name for one in own}
        yield from (GroupKey("", one, {"": one.default}, True) for one in keys_of(RunConfig, only=names))
        return
    if group not in OPTIONS:
        yield from (GroupKey(group, one, {"": one.default}, True) for one in keys_of(kinds[0]))
        return
    found: dict[tuple[str, str, str, str], GroupKey] = {}
    for kind in kinds:
        declared = list(keys_of(kind))
        name = next(one.default for one in declared if one.name == "name")
        for one in declared:
            same = (one.name, one.type, str(one.side), one.meaning)
            known = found.setdefault(same, GroupKey(group, one, {}, False))
            known.options[name] = one.default
    for known in found.values():
        yield dataclasses.replace(known, everywhere=len(known.options) == len(kinds))


@functools.cache
def _open_run_config() -> type:
    """Make the dataclass that Hydra and OmegaConf know the whole config by: a group with options is open there.

    Recipe files extend the option's own schema, and a class of the user's own may have any keys.
    """
    hints, members = typing.get_type_hints(RunConfig), list[tuple[str, Any, Any]]()
    for one in dataclasses.fields(RunConfig):
        default = dataclasses.field(default=one.default, default_factory=one.default_factory)  # type: ignore[call-overload]
        members.append((one.name, Any if one.name in OPTIONS else hints[one.name], default))
    return dataclasses.make_dataclass("OpenRunConfig", members)


def run_schema() -> DictConfig:
    """Return the schema of the whole config, into which values can be merged."""
    from ..config.structured import structured

    return structured(_open_run_config())


def register_schemas() -> None:
    """Register the schema of every recipe group with Hydra, once per process: it takes a tenth of a second."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.object_type import ObjectType

    from ..config.structured import structured
    from ..config.tree import SCHEMA

    store = ConfigStore.instance()
    if store.get_type(f"{SCHEMA}.yaml") is not ObjectType.NOT_FOUND:
        return
    store.store(name=SCHEMA, node=run_schema())
    for group, kinds in OPTIONS.items():
        for kind in kinds:
            # Open, so that a key of another option in a recipe file can be left out, and a user's own class may have any.
            store.store(group=group, name=f"base_{typing.cast(Any, kind).name}", node=structured(kind, struct=False))


def make_composer(config_dir: str | None = None) -> Composer:
    """Make a composer of configs of this schema. Raises ConfigError if `config_dir` does not exist."""
    from ..config.compose import Composer

    register_schemas()
    return Composer(config_dir, OPTIONS)
