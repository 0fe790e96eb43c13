"""Process groups of an exchange in levels (`exchange_levels.py`): how ranks on hosts are divided, and each level's group."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .exchange_levels import dealt_in_turns, describe, exchange_levels, members
from .mesh import Mesh

log = logging.getLogger(__name__)


def choose_levels(mesh: Mesh, axis: DeviceMesh, kind: str, what: str) -> tuple[int, ...]:
    """Choose the levels of an exchange along an axis, and log them if there are several hosts. Every process must call it.

    Where hosts cut some ranks' groups otherwise than others', all exchange directly.

    kind: `parallel.gradient_exchange`; what: subject and verb of the line in the log
    """
    hosts = mesh.hosts_along(axis)
    levels, why = exchange_levels(hosts, kind), ""
    if mesh.differ(str(levels)):
        levels, why = (len(hosts),), ", since hosts do not cut all groups of ranks alike"
    elif kind != "direct" and dealt_in_turns(hosts):
        why = ", since the ranks of a host do not follow each other (--distribution=block would)"
    if mesh.is_main and len(set(mesh.hosts)) > 1:
        log.info("%s%s", describe(levels, what), why)
    return levels


def groups_of_levels(mesh: Mesh, axis: DeviceMesh, levels: Sequence[int]) -> Sequence[dist.ProcessGroup]:
    """Return this rank's group of each level of an axis, from the innermost outwards. Every process must call it."""
    if len(levels) == 1:
        return (axis.get_group(),)
    return mesh.subgroups(axis, members(axis.get_local_rank(), levels))
