"""`meshloom tune … cluster=…`: the layouts that a plan finds for a cluster, as candidates to be measured."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from ..planner.cluster import ClusterConfig
from ..planner.search import limit_of
from ..planner.tables import gib, right
from ..trainer.typed import replace_keys
from .plan_best import best_layouts, described_settings
from .plan_cluster import refuse_too_few
from .planning import plan_of, resolve_plan, without_searched
from .tune_search import Candidate, Tuned

MOST = 10
"""Layouts that are looked for."""


def tuned_on(words: Sequence[str], cluster: ClusterConfig, config_dir: str | None) -> Tuned:
    """Search the layouts of a run on a cluster. Raises ConfigError with its problems, or where nothing fits."""
    resolved = without_searched(resolve_plan(words, config_dir, cluster), words)
    resolved.refuse()
    config = resolved.config
    refuse_too_few(config, cluster)
    best = best_layouts(resolved, words, cluster, MOST)
    found = [
        Candidate(one.settings, plan_of(replace_keys(config, one.settings), ()), one.prediction.seconds)
        for one in best.candidates
    ]
    return Tuned(config, best.given, found, None, limit_of(cluster), None, best.notes)


def layouts_table(tuned: Tuned) -> Table:
    """Tabulate the fastest layouts with their predicted speed."""
    columns = [right(name) for name in ("tokens/s per process", "planned GiB", "speed")]
    table = Table("layout", *columns, title="Fastest first, by prediction", title_justify="left", box=box.SIMPLE)
    fastest = tuned.fitting[0].seconds
    for one in tuned.fitting:
        speeds = f"{one.speed:,.0f}", gib(one.bytes), f"{fastest / one.seconds:.1%}"
        table.add_row(Text(" · ".join(described_settings(one.settings))), *speeds)
    return table
