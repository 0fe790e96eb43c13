"""Read which snapshot memory a process has mapped."""

from __future__ import annotations

from pathlib import Path


def staging_buffers_mapped(process: int) -> int:
    return Path(f"/proc/{process}/maps").read_text().count("memfd:meshloom-checkpoint")
