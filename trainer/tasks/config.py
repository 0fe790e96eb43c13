"""Config of `tasks`: benchmark tasks of lm-eval inside a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...config.cache import expand_user
from ...config.duration import Duration
from ...config.keys import Side, key
from ...config.problems import Problem
from ...data.documents.formats import missing_extra


@dataclass(frozen=True)
class TasksConfig:
    """Tasks that a run is evaluated on, and `meshloom evaluate tasks=…` a checkpoint."""

    SIDE: ClassVar[Side] = Side.HABIT

    names: list[Any] = key([], "tasks and groups of lm-eval, evaluated as tasks/<task>/<metric>; needs meshloom[lm_eval]")
    every: int | float | str | None = key(
        None, "evaluate them every so many steps, or after any duration ('4k samples', '5%'); null: only at the end"
    )
    folder: str | None = key(
        None, "folder of task files (YAML) of your own, which win over those of lm-eval; null: none", Side.PLACEMENT
    )
    few_shot: int | None = key(None, "solved examples before each question; null: as many as the task says")
    limit: int | None = key(None, "only the first questions of each task, so many; null: all")

    def problems(self, key: str = "tasks") -> list[Problem]:
        """Return the problems of the values."""
        found: list[Problem] = []
        if not all(isinstance(name, str) and name for name in self.names):
            found.append(Problem(f"{key}.names", f"{self.names} are no names of tasks", "write a list of names"))
        elif self.names:
            found += missing_extra("lm_eval", "lm_eval", f"{key}.names", "an evaluation on tasks")
        if self.few_shot is not None and self.few_shot < 0:
            found.append(Problem(f"{key}.few_shot", f"{self.few_shot} is no number of examples", "use 0 or more, or null"))
        if self.limit is not None and self.limit < 1:
            found.append(Problem(f"{key}.limit", f"{self.limit} leaves no question", "use 1 or more, or null for all"))
        if self.names and self.folder is not None and not expand_user(self.folder).is_dir():
            fix = "give the folder with the tasks' YAML files, or null"
            found.append(Problem(f"{key}.folder", f"there is no folder '{self.folder}'", fix))
        if self.every is not None:
            try:
                length = Duration.parse(self.every)
            except ValueError as error:
                reason, _, forms = str(error).partition("; ")
                found.append(Problem(f"{key}.every", reason, f"{forms}; use null for at the end"))
            else:
                if not length.value > 0:
                    found.append(Problem(f"{key}.every", f"'{self.every}' is no length", f"use {key}.names=[] for no tasks"))
        return found
