"""The host that a rank is on: asked of the machine itself, not of how ranks were started. Imports no torch."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path


def host_name() -> str:
    """Identify this host. Two of one name (localhost, for example) differ in their boot id."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot_id = ""
    return f"{socket.gethostname()} {boot_id}"


def host_number() -> int:
    """Return a number from 0 to 2⁶³ − 1 of this host that no other has, as far as chance goes."""
    return int.from_bytes(hashlib.blake2b(host_name().encode(), digest_size=8).digest(), "little") >> 1
