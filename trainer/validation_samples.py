"""Deal and load validation samples, during a run and in `meshloom evaluate`."""

from __future__ import annotations

from ..data.assignment import Assigner, Dealer, Share
from ..data.batch import GlobalBatch
from ..data.validation import ValidationPart
from ..parallel.layout import Layout
from ..parallel.mesh import Mesh
from .loop import agree_on_plan
from .schema import RunConfig


def evaluation_dealer(config: RunConfig, layout: Layout, dealer: Dealer) -> Dealer:
    """Return what deals validation samples to the data ranks. dealer: that of the run's global batches."""
    return dealer if config.parallel.hdp != "none" else Assigner(layout.data_size)


def validation_share(config: RunConfig, mesh: Mesh, dealer: Dealer, part: ValidationPart, batch: GlobalBatch) -> Share:
    """Load this rank's share of some of a part's validation samples. All ranks call it: they compare how they deal them.

    Raises PlansDiffer where ranks deal the part's documents in other ways.
    """
    share = dealer.load(part.samples, batch, config.batch.micro_size, mesh.data_rank)
    agree_on_plan(mesh, share, f"validation set {part.name}" if part.name else "the validation samples")
    return share
