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
        # A load is in units of an even one, top_k tokens of count.
        self._tokens = experts.top_k / experts.count
        self._silent = self._tokens >= COLLAPSED  # nearly all experts see every token

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Warn of the first layer found."""
        if self._silent:
            return
        for name, load in row.items():
            if name.startswith("experts/") and name.endswith("/load_max") and load * self._tokens >= COLLAPSED:
                layer, share = name.split("/")[1], load * self._tokens
                log.warning(
                    "step %d: %.0f %% of the tokens choose one expert of layer %s; raise balance.global_batch if it stays so",
                    row["step"],
                    100 * share,
                    layer,
                )
                self._silent = True
                return
