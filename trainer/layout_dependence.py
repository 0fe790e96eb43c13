"""Features of a run that can't keep a rule of the promise in full: said at its start, as in ARCHITECTURE.md's table."""

from __future__ import annotations

from collections.abc import Iterator

from .schema import RunConfig


def layout_dependence(config: RunConfig) -> Iterator[str]:
    """Yield one line for each. Engines say theirs themselves: float8, keys of DeepSpeed's own."""
    if config.optim.compares_halves():
        yield "optim=agvm: its halves of a batch are halves of the ranks, so losses depend a little on the layout (R4)"
    if hasattr(config.batch, "multiple") and config.batch.multiple is None:
        yield (
            "batch.multiple is not set: sizes are rounded to what the layout can cut, so another layout may take other "
            "batches (R1); set it to fix them"
        )
