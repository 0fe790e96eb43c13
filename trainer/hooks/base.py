"""Hooks: small stateful objects that observe a run. Their state is saved in the run's checkpoints.

The loop calls them in the order in which they are listed, on every rank, at the same points. So a hook may communicate if it
does so on all ranks. One exception: `on_run_begin` of hooks that never communicate (`alone`) is called after all others.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.problems import Problem
from ...config.words import first_line

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..loop import Loop


class Hook:
    """Base class: every method does nothing. A subclass overrides what it needs.

    alone       it never communicates, so it may exist on one rank only, as loggers do. Its `on_run_begin` is called after those
                of hooks that may communicate; if it raises on one rank, the run ends cleanly on all
    of_one_run  its state belongs to one run: a run that branches off (resume=<another run's>) does not load it
    fault       what keeps this rank from going on. It is set instead of raised where only some ranks may see it, or see it at
                different steps. All ranks end the run together once the next step's numbers have arrived
    """

    alone = False
    of_one_run = False
    fault: Exception | None = None

    def on_run_begin(self, loop: Loop) -> None:
        """Called once the run is built and, on a resume, restored; before the first step. May refuse the run by raising.

        It must leave alone what an earlier run has written: see `on_run_accepted`.
        """

    def on_run_accepted(self, loop: Loop) -> None:
        """Called after all hooks' `on_run_begin`: nothing refuses the run any more, and files of an earlier one may be changed.

        Must not communicate. If it raises on one rank, the run ends cleanly on all.
        """

    def on_step_begin(self, loop: Loop) -> None:
        """Called before the global batch is drawn."""

    def before_update(self, loop: Loop) -> None:
        """Called once the gradient is ready and clipped, before the weights change."""

    def on_step_end(self, loop: Loop) -> None:
        """Called after the weights and `loop.progress` have changed. The step's numbers are still on the device."""

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Called when a step's numbers have arrived on the host, with one row of metrics.jsonl.

        One step late, so that the host does not wait for the device; not late for a run's first step.
        """

    def on_repeat(self, loop: Loop, step: int) -> None:
        """Called when it turns out that a step has to be taken again. Its `on_step_end` may have been called already."""

    def on_evaluate(self, loop: Loop, row: dict[str, Any]) -> None:
        """Called after an evaluation, with a row that has `step` and `eval_loss`. All earlier rows have arrived.

        It also has `validation/<name>/loss` for each source of a mixture, and for each named validation set.
        """

    def on_tasks(self, loop: Loop, row: dict[str, Any]) -> None:
        """Called after an evaluation on tasks (`tasks.names`), with a row of `step` and `tasks/<task>/<metric>`."""

    def on_routed(self, loop: Loop, counts: Mapping[str, torch.Tensor]) -> None:
        """Called before `on_evaluate`, in a run with mixtures of experts: source → assignments of its samples (L, E)."""

    def on_picture(self, loop: Loop, name: str, picture: np.ndarray) -> None:
        """Called when a hook has drawn something, (height, width, 3) uint8, at the step of `loop.progress`."""

    def on_checkpoint(self, loop: Loop, row: dict[str, Any]) -> None:
        """Called after a save, complete or not, with a row of `checkpoint_step`, `checkpoint_saved` and its durations."""

    def on_run_end(self, loop: Loop, output_dir: Path) -> None:
        """Called when the run has reached its end and its last checkpoint is on disk. Not called if it failed."""

    def close(self) -> None:
        """Release files and connections. Called at the end of every run, also a failed one."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, plain JSON, that a resumed run needs."""
        return {}

    @property
    def waits_for_rows(self) -> bool:
        """True if the state depends on the rows of `on_metrics`, so that a save waits for the newest row.

        Default: true if both `on_metrics` and `state_dict` are overridden.
        """
        return type(self).on_metrics is not Hook.on_metrics and type(self).state_dict is not Hook.state_dict

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Called before `on_run_begin`."""


def hooks_by_name(hooks: Sequence[Hook]) -> dict[str, Hook]:
    """Return hooks by the names under which their state is saved: the class name, and a number from its second hook on."""
    found: dict[str, Hook] = {}
    seen: Counter[str] = Counter()
    for hook in hooks:
        name = type(hook).__name__
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name} {seen[name]}"] = hook
    return found


def hook_problems(nodes: Sequence[Any]) -> Iterator[Problem]:
    """Yield the problems of the nodes of `trainer.hooks`. Builds no hook: a constructor may open files."""
    if not nodes:
        return
    from hydra.utils import get_object  # imported here, so that commands without hooks start faster

    for number, node in enumerate(nodes):
        key = f"trainer.hooks[{number}]"
        if not isinstance(node, Mapping) or "_target_" not in node:
            yield Problem(key, f"{node!r} names no class", "write {_target_: my_package.MyHook, …}")
            continue
        try:
            target = get_object(str(node["_target_"]))
        except Exception as error:  # importing a user's module may raise anything
            cause = error.__cause__ or error
            message = f"{node['_target_']} can't be imported: {first_line(cause)}"
            yield Problem(key, message, "is its package installed or on PYTHONPATH?")
            continue
        if not callable(target) or (inspect.isclass(target) and not issubclass(target, Hook)):
            yield Problem(key, f"{node['_target_']} is no hook", "derive it from meshloom.trainer.hooks.Hook")
            continue
        try:
            inspect.signature(target).bind(**{str(name): None for name in node if not str(name).startswith("_")})
        except TypeError as error:
            yield Problem(key, f"{node['_target_']}: {error}", "give it the arguments of its constructor")
