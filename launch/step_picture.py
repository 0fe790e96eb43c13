"""The picture of a run's first step: its documents on the ranks, as hybrid data parallelism deals them and without it."""

from __future__ import annotations

from ..data.batch import GlobalBatch
from ..parallel.hybrid.assignment import in_lockstep
from ..parallel.hybrid.cost import decoder_flops
from ..parallel.hybrid.planning import assign
from ..parallel.hybrid.share import BatchDocuments
from ..planner.step_drawing import Panel, step_svg
from ..trainer.hybrid import hybrid_dealer
from ..trainer.run import prepared_data
from ..trainer.schema import RunConfig
from .planning import Plan


def step_picture(config: RunConfig, plan: Plan) -> str:
    """Draw the first step of a planned run with `parallel.hdp`. Its data are prepared, if they are not yet.

    Raises ConfigError for data that can't be read.
    """
    data = prepared_data(config.data, config.seed, config.model.vocabulary)
    micro, seq_len = plan.job.micro, data.seq_len
    dealer = hybrid_dealer(config, plan.layout, plan.model.shape, decoder_flops(plan.model.shape))
    lengths = BatchDocuments.of(data.train(), GlobalBatch(0, plan.samples)).lengths
    capacity = dealer.row_tokens(seq_len, micro)
    costs = dealer.costs(capacity)
    static = assign(lengths, dealer.data_size, capacity, costs, "static")
    panels = [
        Panel("static groups of ranks", in_lockstep(static) if dealer.lockstep else static),
        Panel("hybrid data parallelism", dealer.plan(lengths, seq_len, micro)),
    ]
    sizes = f"{len(lengths):,} documents of {sum(lengths):,} tokens on {dealer.data_size} ranks, rows of {capacity:,}"
    return step_svg(panels, lengths, costs, f"Step 1: {sizes}")
