"""Features that make a run's numbers depend on its layout, as listed in ARCHITECTURE.md. A run logs them at its start."""

from __future__ import annotations

from collections.abc import Iterator

from .schema import RunConfig


def layout_dependence(config: RunConfig) -> Iterator[str]:
    """Yield one line per such feature. Engines log their own: float8, DeepSpeed's keys."""
    if config.optim.compares_halves():
        yield "optim=agvm: its halves of a batch are halves of the ranks, so losses depend a little on the layout (R4)"
    if hasattr(config.batch, "multiple") and config.batch.multiple is None:
        yield (
            "batch.multiple is not set: sizes are rounded to what the layout can cut, so another layout may take other "
            "batches (R1); set it to fix them"
        )
