"""Keep which layers of a run were lost, and made of others: its losses are no function of its recipe any more."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...checkpoint.rebuild import RebuiltLayers
from ...config.words import counted
from ..watch.incidents import Incident, IncidentLog
from .base import Hook

if TYPE_CHECKING:
    from ..loop import Loop

log = logging.getLogger(__name__)


class RebuiltHistory(Hook):
    """Says at each start which layers were rebuilt, and keeps it in the run's checkpoints and incidents.

    rebuilt  oldest first: the step, what became of which layers, and the damage
    """

    alone = True

    def __init__(self) -> None:
        self.rebuilt: list[dict[str, Any]] = []
        self._news: list[Incident] = []

    def add(self, step: int, layers: Sequence[RebuiltLayers], damage: Sequence[str]) -> None:
        """Note that the step which the run resumes from had lost layers."""
        named = "; ".join(each.describe() for each in layers)
        message = (
            f"step {step} had lost {counted(len(damage), 'file')}, and layers were rebuilt from their neighbours"
            f" (checkpoint.lost_layers): {named}. The run's losses are not those of its recipe any more"
        )
        self.rebuilt.append({"step": step, "layers": [asdict(each) for each in layers], "damage": list(damage)})
        self._news.append(Incident("layers_rebuilt", message, step, details=self.rebuilt[-1]))

    def on_run_begin(self, loop: Loop) -> None:
        """Say what was rebuilt, now and at earlier starts."""
        for incident in self._news:
            log.warning("%s", incident.message)
        earlier = [str(each["step"]) for each in self.rebuilt[: len(self.rebuilt) - len(self._news)]]
        if earlier:
            log.warning("layers were rebuilt from their neighbours at step %s: losses depend on it", ", ".join(earlier))

    def on_run_accepted(self, loop: Loop) -> None:
        """Write the incidents: an earlier run's have been moved aside."""
        incidents = IncidentLog(loop.output_dir)
        for incident in self._news:
            incidents.write(incident)
        self._news = []

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values; empty as long as nothing was rebuilt."""
        return {"rebuilt": self.rebuilt} if self.rebuilt else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.rebuilt = list(state.get("rebuilt", []))
