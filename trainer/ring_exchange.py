"""Say at the start where `parallel.ring_exchange=queries` is not what a run wants. Imports no torch."""

from __future__ import annotations

from ..config.precision import PRECISIONS
from ..models.config import DecoderConfig
from ..models.part_config import AttentionConfig
from ..parallel.context.traffic import position_bytes
from .schema import RunConfig


def ring_notices(config: RunConfig) -> list[str]:
    """Return what a start says of queries that move: that there is no ring, or that keys would be fewer bytes."""
    if {"model", "parallel"} & set(config.unusable) or config.parallel.ring_exchange != "queries":
        return []
    if config.parallel.cp == 1 and config.parallel.hdp == "none":
        return ["parallel.ring_exchange=queries has no effect: without parallel.cp or parallel.hdp there are no rings"]
    if not isinstance(config.model, DecoderConfig):
        return []
    times = _bytes(config, config.model, "queries") / _bytes(config, config.model, "keys")
    if times <= 1:
        return []
    return [f"parallel.ring_exchange=queries sends {times:.1f} times the bytes of keys, as the model has fewer heads of keys"]


def _bytes(config: RunConfig, model: DecoderConfig, ring_exchange: str) -> float:
    """Return the bytes of a position that both passes of all layers send, with the results that come back."""
    unit, total = PRECISIONS[config.precision].bytes, 0.0
    for part in (block.attention for block in model.blocks()):
        q_width = part.heads * part.head_dim
        kv_width = part.kv_width if isinstance(part, AttentionConfig) else q_width
        widths = {"q_width": q_width, "kv_width": kv_width, "heads": part.heads, "unit": unit}
        total += sum(sum(position_bytes(ring_exchange, **widths, backward=backward)) for backward in (False, True))
    return total
