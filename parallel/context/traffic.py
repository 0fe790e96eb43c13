"""Bytes that ring attention sends for each position that another member needs. Imports no torch."""

from __future__ import annotations


def position_bytes(
    ring_exchange: str, *, q_width: float, kv_width: float, heads: float, unit: int, backward: bool
) -> tuple[float, float]:
    """Return the bytes of a position that one layer's pass sends to who computes on it, and of the results that come back.

    ring_exchange      `parallel.ring_exchange`, of positions that are sent directly
    q_width, kv_width  of all query heads together, and of all key heads; values are as wide as keys
    heads              query heads
    unit               bytes of an element; sums have 4 or more
    Each direction of a link carries both: a member receives as much as it sends.
    """
    row = heads * max(4, unit)  # one number of each head: a log-sum-exp, or delta
    if ring_exchange == "queries":
        return (2 * q_width * unit + 2 * row, q_width * unit) if backward else (q_width * unit, q_width * unit + row)
    return 2 * kv_width * unit, 2 * kv_width * unit if backward else 0
