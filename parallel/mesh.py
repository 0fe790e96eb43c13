"""Mesh: the process groups of a Layout. The only code that starts process groups or reads this process's rank."""

from __future__ import annotations

import contextlib
import datetime
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .compute_time import ComputeTime
from .heartbeat import Heartbeat
from .hosts import host_number
from .layout import EXPERT_AXES, ISLAND, Layout
from .open_files import raise_file_limit


def environment_world_size() -> int:
    """Return the number of processes that were started together (torchrun's WORLD_SIZE); 1 for one started alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def pick_device() -> torch.device:
    """Choose this process's device: its own GPU by LOCAL_RANK where there are GPUs, otherwise the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


ACROSS_LIMIT = 12
"""Islands wait for one another so many times as long as the ranks of one: a link may be slow, and an island many steps late."""


@dataclass(frozen=True)
class WeightAxes:
    """The ranks that hold one group of parameters.

    shards  those that each hold a part of every weight
    copies  those that hold the same part
    both    copies × shards, or shards alone where there is one copy: as FSDP2 takes them
    outer   those between whom every weight's rows are divided before that (experts: "ep"); None: a weight is not
    """

    shards: DeviceMesh
    copies: DeviceMesh
    both: DeviceMesh
    outer: DeviceMesh | None = None

    @classmethod
    def of(cls, root: DeviceMesh, copies: str, shards: str, outer: str | None = None) -> WeightAxes:
        """Read them off a mesh, by the names of its axes."""
        both = root[copies, shards] if root[copies].size() > 1 else root[shards]
        return cls(root[shards], root[copies], both, None if outer is None else root[outer])

    @property
    def num_shards(self) -> int:
        """Number of parts that a weight is cut into."""
        return self.shards.size()

    @property
    def num_copies(self) -> int:
        """Number of ranks that hold the same part."""
        return self.copies.size()

    @property
    def shared(self) -> bool:
        """True if a gradient is summed over several ranks."""
        return self.num_shards * self.num_copies > 1


@dataclass(frozen=True)
class Mesh:
    """This process's place in a layout, and its process groups.

    Under local updating the axes are those of this process's island, and what says "all processes" means all islands'. `island`
    is the same place in the layout of the island alone, whose processes are then all there are.

    axes            name → 1-D device mesh: "pp", "cp", "tp"; "data" (the ranks over which losses and gradients are
                    summed); "stage" (all ranks of this pipeline stage); "ep", where it is larger than one
    weight_axes     name of a group of parameters → the ranks that hold it: "dense", and under expert parallelism "experts"
    limit           how long a collective waits for a lost rank
    heartbeat       says what this rank is doing
    compute_time    measures this rank's own work
    before_closing  callbacks to run before the process groups are destroyed
    opened          how often each of its stores was opened
    everyone        all of its processes; None: all of the run's
    inner           the mesh of the island, where there are several
    across          the ranks at this rank's place in all islands, in order; their group is gloo's. None: there is one island
    """

    layout: Layout
    rank: int
    device: torch.device
    axes: dict[str, DeviceMesh]
    weight_axes: dict[str, WeightAxes]
    limit: datetime.timedelta
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    compute_time: ComputeTime = field(init=False)
    before_closing: list[Callable[[], object]] = field(default_factory=list)
    opened: Counter[str] = field(default_factory=Counter[str])
    everyone: dist.ProcessGroup | None = None
    inner: Mesh | None = None
    across: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "compute_time", ComputeTime(self.device, self.heartbeat))

    @classmethod
    def connect(cls, layout: Layout, device: torch.device, timeout: float = 600.0, heartbeat: Heartbeat | None = None) -> Mesh:
        """Join the process groups. Every process of the run calls it once, with the same layout.

        timeout: seconds before a collective that waits for a lost rank raises
        heartbeat: of this process; default: one that nobody watches
        """
        if device.type == "cuda":
            torch.cuda.set_device(device)
        raise_file_limit(layout.world_size, tell=os.environ.get("RANK", "0") == "0")
        limit = datetime.timedelta(seconds=timeout)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            if "RANK" in os.environ:
                dist.init_process_group(backend, timeout=limit)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        assert dist.get_world_size() == layout.world_size, f"{layout} on {dist.get_world_size()} processes"
        # Sharding of weights and slicing of sequences cut the same ranks in two ways, hence two meshes. Under ZeRO-0 every
        # data and context rank is a copy. Both orders number the ranks as Layout does.
        copies = layout.gradient_ranks // layout.weight_ranks
        islands = {ISLAND: layout.islands} if layout.islands > 1 else {}
        sizes = {**islands, "pp": layout.pp, "copies": copies, "weights": layout.weight_ranks, "tp": layout.tp}
        root = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        axes = {axis: root[axis] for axis in ("pp", "tp")}
        axes["data"] = root["copies", "weights"]._flatten("data")
        axes["stage"] = root["copies", "weights", "tp"]._flatten("stage")
        slices = {**islands, "pp": layout.pp, "data_rank": layout.data_size, "cp": layout.cp, "tp": layout.tp}
        axes["cp"] = init_device_mesh(device.type, tuple(slices.values()), mesh_dim_names=tuple(slices))["cp"]
        weight_axes = {"dense": WeightAxes.of(root, "copies", "weights")}
        if layout.ep > 1:
            assert not islands, "mixtures are not trained on islands"
            root = init_device_mesh(device.type, tuple(layout.expert_sizes.values()), mesh_dim_names=EXPERT_AXES)
            axes["ep"] = root["ep"]
            weight_axes["experts"] = WeightAxes.of(root, "expert_copies", "expert_weights", outer="ep")
        held = [axis for each in weight_axes.values() for axis in (each.shards, each.copies)]
        for axis in (*axes.values(), *held):  # a device mesh gives its groups PyTorch's own limit
            dist.distributed_c10d._set_pg_timeout(limit, axis.get_group())
        whole = cls(layout, dist.get_rank(), device, axes, weight_axes, limit, heartbeat or Heartbeat())
        return whole.divided() if islands else whole

    def divided(self) -> Mesh:
        """Make the process groups of islands. Every process must call it."""
        size, count = self.layout.island_ranks, self.layout.islands
        inside = [list(range(first, first + size)) for first in range(0, count * size, size)]
        kind = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        everyone, _ = dist.new_subgroups_by_enumeration(inside, timeout=self.limit, backend=kind)
        # What islands send each other travels through the host's memory: gloo never meets an island's own NCCL.
        places = [list(range(place, count * size, size)) for place in range(size)]
        across, _ = dist.new_subgroups_by_enumeration(places, timeout=ACROSS_LIMIT * self.limit, backend="gloo")
        inner = replace(
            self, layout=self.layout.of_one_island(), rank=self.rank % size, everyone=everyone, across=across, opened=Counter()
        )
        return replace(self, inner=inner, across=across)

    def group_of_hosts(self) -> dist.ProcessGroup:
        """Make a gloo group of all processes of the run, of all islands. Every process must call it."""
        group = dist.new_group(timeout=ACROSS_LIMIT * self.limit, backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        return group

    @property
    def island(self) -> Mesh:
        """The processes that take steps together: this mesh, or that of its island."""
        return self if self.inner is None else self.inner

    @property
    def coordinates(self) -> dict[str, int]:
        """Axis name → this rank's index along it."""
        return self.layout.coordinates(self.rank)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which logs and writes for the run; in the mesh of an island, for the island."""
        return self.rank == 0

    @property
    def island_number(self) -> int:
        """Index of this process's island; 0 where there is one."""
        return 0 if self.across is None else self.across.rank()

    def global_rank(self, rank: int) -> int:
        """Return the number in the whole run of a rank of this mesh: in that of an island, ranks are counted from 0."""
        return rank if self.everyone is None else dist.get_global_rank(self.everyone, rank)

    @property
    def data_rank(self) -> int:
        """Index of this rank's share of the global batch."""
        return self.layout.data_rank(self.rank)

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return the process group of an axis."""
        return self.axes[axis].get_group()

    def size(self, axis: str) -> int:
        """Return the number of ranks along an axis."""
        return self.axes[axis].size()

    def another_group(self, axis: DeviceMesh, options: Any) -> dist.ProcessGroup:
        """Make a second group of an axis' ranks, with its own NCCL options. Every process must call it."""
        ranks = dist.get_process_group_ranks(axis.get_group())
        options._timeout = self.limit
        group = dist.new_group(ranks, self.limit, "nccl", options, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return group

    def subgroups(self, axis: DeviceMesh, parts: Sequence[Sequence[int]]) -> list[dist.ProcessGroup]:
        """Make a group of the ranks at some positions along an axis, for each list of positions, all with this rank's.

        Every process must call it, with as many lists, in an order that is the same for all ranks of each group. PyTorch names
        such a group by its ranks and by the number of groups that the caller is in: where that differs, ranks wait for ever.
        """
        whole = dist.get_process_group_ranks(axis.get_group())
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        found: list[dist.ProcessGroup] = []
        for positions in parts:
            ranks = [whole[position] for position in positions]
            group = dist.new_group(ranks, self.limit, backend, use_local_synchronization=True)
            assert isinstance(group, dist.ProcessGroup)
            found.append(group)
        return found

    @cached_property
    def hosts(self) -> list[int]:
        """A number for the host of each process, by rank: the same for those of one host. At first a collective over all."""
        return self.codes(host_number())

    def hosts_along(self, axis: DeviceMesh) -> list[int]:
        """Return the numbers of the hosts along an axis, in order. At first a collective over all processes."""
        ranks = dist.get_process_group_ranks(axis.get_group())
        return [self.hosts[rank if self.everyone is None else dist.get_group_rank(self.everyone, rank)] for rank in ranks]

    def sum(self, values: torch.Tensor, axis: str | None = None) -> torch.Tensor:
        """Sum over an axis (default: all processes), in place. Does nothing on an axis of size 1."""
        group = self.group(axis) if axis else self.everyone
        if dist.get_world_size(group) > 1:
            dist.all_reduce(values, group=group)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on some process. A collective over all of them."""
        votes = torch.tensor([int(flag)], device=self.device)
        return bool(self.sum(votes).item())

    def differ(self, text: str) -> bool:
        """Return whether the text differs on some process. A collective over all of them."""
        codes = torch.zeros(self.layout.world_size, dtype=torch.int64, device=self.device)
        codes[self.rank] = zlib.crc32(text.encode())
        return bool((self.sum(codes) != zlib.crc32(text.encode())).any())

    def codes(self, code: int) -> list[int]:
        """Return the code of every process, by rank. A collective over all of them, on the host: it waits for no device."""
        codes = torch.zeros(self.layout.world_size, dtype=torch.int64)
        codes[self.rank] = code
        return self.sum(codes).tolist()

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the values of all processes, which can be pickled, by rank. A collective over all of them."""
        held: list[Any] = [value] * self.layout.world_size
        if self.layout.world_size > 1:
            dist.all_gather_object(held, value, self.everyone)
        return held

    def from_main(self, value: Any) -> Any:
        """Return rank 0's value, which can be pickled, on every process. A collective over all of them."""
        held = [value]
        if self.layout.world_size > 1:
            dist.broadcast_object_list(held, group=self.everyone, group_src=0)
        return held[0]

    def store(self, name: str) -> dist.Store:
        """Open a key-value store of all processes under its own name: agreement without a collective.

        Every process must open it equally often. Who opens a name again, as a run that goes back does, gets an empty store.
        """
        number = self.opened[name]
        self.opened[name] += 1
        island = "" if self.everyone is None else f"island-{self.island_number}-"
        name = f"{name}+{number}" if number else name
        return dist.PrefixStore(f"{island}{name}", dist.distributed_c10d._get_default_store())

    def barrier(self) -> None:
        """Wait for every process."""
        if self.layout.world_size > 1:
            dist.barrier(self.everyone)

    def release(self) -> None:
        """Run the callbacks of `before_closing`: what a run has made on these process groups ends, and another may begin.

        The last comes first. All run, even if one of them fails.
        """
        with contextlib.ExitStack() as ending:
            for callback in self.before_closing:
                ending.callback(callback)
            self.before_closing.clear()

    def rearranged(self, layout: Layout) -> Mesh:
        """Return a mesh of the same processes in another layout. To close this one closes both: its groups stay until then."""
        self.release()
        later = Mesh.connect(layout, self.device, self.limit.total_seconds(), self.heartbeat)
        self.before_closing.append(later.release)
        return later

    def close(self) -> None:
        """Run the callbacks of `before_closing` and destroy the process groups, even if one of them fails."""
        try:
            self.release()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
