"""Hooks: small stateful objects that watch a run. Their state goes through the same checkpoint as everything else.

The loop calls them in the order they are listed, on every rank, at the same points, so a hook may communicate as long as
it does so on all ranks. One exception: `on_run_begin` of those that never communicate (`alone`) comes after that of all others.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.problems import Problem

if TYPE_CHECKING:
    from ..loop import Loop


class Hook:
    """Base class: every method does nothing. A subclass overrides what it needs.

    alone       it never communicates, and so may live on one process only, as loggers do. Its `on_run_begin` comes after those
                of the hooks that may communicate; where it raises on one process, the run ends in good order on all
    of_one_run  its state names the run that it belongs to, so a run that branches off (resume=<another run's>) begins without
    """

    alone = False
    of_one_run = False

    def on_run_begin(self, loop: Loop) -> None:
        """Everything is built and, on a resume, restored; no step has been taken."""

    def on_step_begin(self, loop: Loop) -> None:
        """Before the global batch is drawn."""

    def before_update(self, loop: Loop) -> None:
        """The gradient is ready and clipped; the weights are about to change."""

    def on_step_end(self, loop: Loop) -> None:
        """The weights have changed and `loop.progress` has moved. The step's numbers are still on the device."""

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """The numbers of a step have arrived: one row of metrics.jsonl. Comes one step late, so that nobody waits, but
        for a run's first, for which somebody does."""

    def on_evaluate(self, loop: Loop, row: dict[str, Any]) -> None:
        """The validation set has been looked at: a row with `step` and `eval_loss`. All earlier rows have arrived."""

    def on_checkpoint(self, loop: Loop, row: dict[str, Any]) -> None:
        """A save has ended, complete or not: a row with `checkpoint_step`, `checkpoint_saved` and how long it took."""

    def on_run_end(self, loop: Loop, output_dir: Path) -> None:
        """The run ended as asked and its last checkpoint is on disk. Not called when it failed."""

    def close(self) -> None:
        """Called at the end of every run, failed ones included: release files and connections."""

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON that the next run of this recipe needs to go on."""
        return {}

    @property
    def waits_for_rows(self) -> bool:
        """Whether its state depends on the rows of `on_metrics`: a save then waits for the newest. Default: it has both."""
        return type(self).on_metrics is not Hook.on_metrics and type(self).state_dict is not Hook.state_dict

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; called before `on_run_begin`."""


def named(hooks: Sequence[Hook]) -> dict[str, Hook]:
    """Hooks by the names that their state is saved under: the class's, and from the second of a class on its number, too."""
    found: dict[str, Hook] = {}
    seen: Counter[str] = Counter()
    for hook in hooks:
        name = type(hook).__name__
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name} {seen[name]}"] = hook
    return found


def hook_problems(nodes: Sequence[Any]) -> Iterator[Problem]:
    """What keeps the nodes of `trainer.hooks` from becoming hooks, found without building one: it may open files."""
    if not nodes:
        return
    from hydra.utils import get_object  # here, because commands that build no hook start quicker without

    for number, node in enumerate(nodes):
        key = f"trainer.hooks[{number}]"
        if not isinstance(node, Mapping) or "_target_" not in node:
            yield Problem(key, f"{node!r} names no class", "write {_target_: my_package.MyHook, …}")
            continue
        try:
            target = get_object(str(node["_target_"]))
        except Exception as error:  # whatever the import of a user's module raises
            cause = error.__cause__ or error
            reason = next(iter(str(cause).splitlines()), type(cause).__name__)
            yield Problem(key, f"{node['_target_']} can't be imported: {reason}", "is its package installed or on PYTHONPATH?")
            continue
        if not callable(target) or (inspect.isclass(target) and not issubclass(target, Hook)):
            yield Problem(key, f"{node['_target_']} is no hook", "derive it from meshloom.trainer.hooks.Hook")
            continue
        try:
            inspect.signature(target).bind(**{str(name): None for name in node if not str(name).startswith("_")})
        except TypeError as error:
            yield Problem(key, f"{node['_target_']}: {error}", "give it the arguments of its constructor")
