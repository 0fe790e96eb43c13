"""What a process has mapped of snapshot memory."""

from __future__ import annotations

from pathlib import Path


def arenas_mapped(process: int) -> int:
    return Path(f"/proc/{process}/maps").read_text().count("memfd:meshloom-checkpoint")
