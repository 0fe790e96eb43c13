"""Which ranks share a host: asked of the machines themselves, not of how they were started."""

from __future__ import annotations

import socket
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def host_name() -> str:
    """Identify this host. Two of one name (localhost, for example) differ in their boot id."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot_id = ""
    return f"{socket.gethostname()} {boot_id}"


def hosts_of(axis: DeviceMesh, device: torch.device) -> list[int]:
    """Return a number for the host of each rank along an axis, in order: the same for ranks of one host. A collective."""
    group = axis.get_group()
    here = torch.tensor([zlib.crc32(host_name().encode())], dtype=torch.int64, device=device)
    hosts = [torch.empty_like(here) for _ in range(axis.size())]
    dist.all_gather(hosts, here, group=group)
    return torch.cat(hosts).tolist()
