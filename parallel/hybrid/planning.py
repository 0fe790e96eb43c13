"""Plan a step: deal documents of known lengths to ranks. Every rank finds the same plan without a message."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...data.assignment import any_number
from .assignment import HybridAssignment
from .cost import CostModel
from .greedy import greedy
from .lockstep import lockstep
from .pipelined import pipelined
from .static import static

METHODS: dict[str, Callable[[Sequence[int], int, int, CostModel], HybridAssignment]] = {
    "static": static,
    "greedy": greedy,
    "lockstep": lockstep,
}


def row_unit(capacity: int, tp: int) -> int:
    """Return the number of which a row's positions are a multiple: kernels like multiples of 128, tensor parallelism of tp."""
    return tp * (128 if capacity >= 8192 else 16 if capacity >= 512 else 1)


def assign(
    lengths: Sequence[int],
    ranks: int,
    capacity: int,
    costs: CostModel,
    method: str = "greedy",
    stages: int = 1,
    can_run: Callable[[int], bool] = any_number,
) -> HybridAssignment:
    """Deal documents of these lengths to `ranks` ranks, in rows of at most `capacity` tokens, by one of `METHODS`.

    stages, can_run: of the pipeline that each rank is the first of (`pipelined`)
    Raises ValueError for a document that is longer than the rows of all ranks together.
    """
    if lengths and max(lengths) > ranks * capacity:
        raise ValueError(f"a document of {max(lengths)} tokens is longer than {ranks} rows of {capacity}, one on each rank")
    if stages > 1:
        return pipelined(lengths, ranks, capacity, costs, stages, can_run, together=method == "lockstep")
    return METHODS[method](lengths, ranks, capacity, costs)
