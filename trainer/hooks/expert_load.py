"""A warning, once a run, of a mixture whose tokens nearly all choose one expert."""

from __future__ import annotations

import logging
from typing import Any

from ...models.mixture.config import ExpertsConfig
from ..loop import Loop
from .base import Hook

log = logging.getLogger(__name__)

COLLAPSED = 0.9
"""Share of a layer's tokens that choose its busiest expert, from which it is warned of."""


class WarnOfCollapse(Hook):
    """Reads the busiest experts' loads from the metrics. Runs on one rank."""

    alone = True

    def __init__(self, experts: ExpertsConfig) -> None:
        self._experts, self._silent = experts, False

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Warn of the first layer found."""
        for name, load in row.items() if not self._silent else ():
            if not (name.startswith("experts/") and name.endswith("/load_max")):
                continue
            layer = name.split("/")[1]
            # A load is in units of an even one. Under a ReLU router tokens choose as many experts as they like.
            even = row.get(f"experts/{layer}/active", self._experts.top_k) / self._experts.count
            if even < COLLAPSED <= load * even:  # otherwise nearly all experts see every token
                log.warning(
                    "step %d: %.0f %% of the tokens choose one expert of layer %s; raise balance.global_batch if it stays so",
                    row["step"],
                    100 * load * even,
                    layer,
                )
                self._silent = True
                return
