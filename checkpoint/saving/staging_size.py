"""Size of staging buffers. Imports no torch."""

from __future__ import annotations

from ..writing.watermark import TRAILER

HUGE_PAGE = 2 * 1024 * 1024


def rounded(size: int) -> int:
    """Return the memory that a staging buffer for so many bytes takes: with its trailer, in whole pages of either kind."""
    return -(-(size + TRAILER) // HUGE_PAGE) * HUGE_PAGE
