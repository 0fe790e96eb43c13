"""Elements as plain integers of their size, which NumPy can slice; no PyTorch is imported to look at a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np

RAW: dict[int, np.dtype[Any]] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
"""Bytes of an element → the unsigned integer of that size."""
