"""Time of collectives inside a node and across nodes. Imports no torch.

A group's bandwidth across nodes is min(link of a GPU, the group's ranks in a node × a GPU's share of the node's cards): a ring
through all ranks of a node leaves it once. An all-gather or reduce-scatter of S bytes over P ranks takes (P − 1)/P · S/B, an
all-reduce twice that (Thakur et al., 2005), and each has a latency that grows with the ring. In an all-to-all no rank passes on
what others sent, so what a rank sends to other nodes goes at its own GPU's share of the cards.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul

from ..parallel.config import ParallelConfig
from ..parallel.exchange_levels import exchange_levels
from ..parallel.layout import AXES, Layout
from .cluster import ClusterConfig


@dataclass(frozen=True)
class Group:
    """A group of ranks that communicate.

    ranks      number of them
    bandwidth  bytes per second that each gets, in each direction
    latency    seconds of a collective that moves nothing
    local      bytes per second of the links inside a node, whose traffic computation feels
    here       the fewest ranks of the group on one of its nodes
    own        bytes per second that a rank sends to other nodes when all send to all; inside one node, the links'
    """

    ranks: int
    bandwidth: float
    latency: float
    local: float
    here: int
    own: float

    def gather(self, size: float, times: int = 1) -> float:
        """Return the seconds of so many all-gathers or reduce-scatters, of `size` bytes of whole arrays in all."""
        if self.ranks == 1:
            return 0.0
        return size * (self.ranks - 1) / self.ranks / self.bandwidth + times * self.latency

    def all_reduce(self, size: float, times: int = 1) -> float:
        """Return the seconds of so many all-reduces, of `size` bytes of arrays in all."""
        return 2 * self.gather(size, times)

    def exchange(self, size: float, times: int = 1) -> float:
        """Return the seconds of so many all-to-alls, in which each rank has `size` bytes in all and keeps a part of them.

        The links inside nodes and the network cards work at the same time; the slower of them tells.
        """
        if self.ranks == 1:
            return 0.0
        part = size / self.ranks
        inside, outside = part * (self.here - 1) / self.local, part * (self.ranks - self.here) / self.own
        return max(inside, outside) + times * self.latency

    def send(self, size: float) -> float:
        """Return the seconds in which a rank sends `size` bytes to a neighbour."""
        return size / self.bandwidth + self.latency / max(1, self.ranks - 1)


def group_of(cluster: ClusterConfig, layout: Layout, *axes: str) -> Group:
    """Describe the groups of ranks that differ along these neighbouring axes, by the slowest of them."""
    outer, inner = AXES.index(axes[0]), AXES.index(axes[-1])
    size, stride = 1, 1
    for axis in AXES[outer : inner + 1]:
        size *= layout.sizes[axis]
    for axis in AXES[inner + 1 :]:
        stride *= layout.sizes[axis]
    return group(cluster, size, stride, layout.world_size)


def group(cluster: ClusterConfig, size: int, stride: int = 1, world_size: int | None = None) -> Group:
    """Describe groups of `size` ranks that lie `stride` apart, by the slowest of them."""
    rates, local = cluster.rates, cluster.link * 1e9 * cluster.rates.link
    reach = min(stride * size, world_size or stride * size)
    here, nodes = _spread(size, stride, world_size or reach, cluster.gpus_per_node)
    if nodes == 1:
        return Group(size, local, rates.latency * (size - 1), local, size, local)
    share = node_bytes(cluster, reach) * rates.network / cluster.gpus_per_node
    latency = rates.latency * (here - 1) + rates.network_latency * (nodes - 1)
    return Group(size, min(local, here * share), latency, local, here, min(local, share))


@functools.cache
def _spread(size: int, stride: int, world_size: int, per_node: int) -> tuple[int, int]:
    """Return the fewest ranks that a group of `size`, `stride` apart, has on one of its nodes, and the most nodes of a group.

    Groups lie one behind another, so that a node's end may cut some of them and not others.
    """
    reach = size * stride
    starts = {(first + offset) % per_node for first in range(0, world_size, reach) for offset in range(stride)}
    counts = [Counter(rank // per_node for rank in range(start, start + reach, stride)) for start in starts]
    return min(min(each.values()) for each in counts), max(map(len, counts))


def node_bytes(cluster: ClusterConfig, reach: int) -> float:
    """Return the bytes per second of a node for groups of neighbours that span `reach` ranks: the slowest's."""
    if not cluster.islands:
        return cluster.node_network
    ends = [0, *accumulate(island.nodes * cluster.gpus_per_node for island in cluster.islands)]
    crosses = any(end % reach for end in ends[1:-1])
    inside = [island.gbit for island, (start, end) in zip(cluster.islands, pairwise(ends), strict=True) if end - start >= reach]
    slowest: float = min([*inside, *([cluster.between] if crosses or not inside else [])])
    return slowest * 1e9 / 8


def gradient_levels(parallel: ParallelConfig, layout: Layout, per_host: int, *, experts: bool = False) -> tuple[int, ...]:
    """Return the levels in which gradients are exchanged under ZeRO-1.

    Where hosts would cut the groups of ranks that share weights in several ways, the exchange is direct, as in a run.

    per_host: ranks on each host, filled in order; experts: whether of experts that are dealt out, or of all other weights
    """
    size, stride = (layout.expert_weights, layout.ep) if experts else (layout.weight_ranks, layout.tp)
    return _levels(parallel.gradient_exchange, layout.world_size, size, stride, per_host)


def matrix_levels(parallel: ParallelConfig, layout: Layout, per_host: int) -> tuple[int, ...]:
    """Return the levels in which whole matrices travel among the ranks of a stage. per_host: as in `gradient_levels`."""
    return _levels(parallel.gradient_exchange, layout.world_size, layout.stage_ranks, 1, per_host)


def level_groups(cluster: ClusterConfig, levels: Sequence[int], stride: int, world_size: int) -> list[Group]:
    """Describe the groups of each level, the innermost first. stride: how far apart the ranks of the first are"""
    strides = accumulate(levels[:-1], mul, initial=stride)
    return [group(cluster, size, each, world_size) for size, each in zip(levels, strides, strict=True)]


def _levels(kind: str, world_size: int, size: int, stride: int, per_host: int) -> tuple[int, ...]:
    """Return the levels of groups of `size` ranks that lie `stride` apart."""
    reach = size * stride
    # What a group's hosts look like depends on where in a host its first rank is.
    starts = {(first + offset) % per_host for first in range(0, world_size, reach) for offset in range(stride)}
    found = {exchange_levels([rank // per_host for rank in range(start, start + reach, stride)], kind) for start in starts}
    return found.pop() if len(found) == 1 else (size,)
