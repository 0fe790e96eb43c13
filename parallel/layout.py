"""Layout: the sizes of the mesh axes, and which rank is where on them. Pure arithmetic; `mesh.py` makes the process groups.

Axes from the outermost to the innermost (ranks that differ in an inner axis are neighbours, so that the axis with the
most communication, tensor parallelism, stays inside a node):

    pp        pipeline stages
    replicate groups that each hold a whole sharded copy (HSDP)
    shard     data parallelism with ZeRO sharding
    cp        context parallelism: slices of the same sequences; weights are sharded over shard × cp
    tp        tensor parallelism

A global batch is dealt over replicate × shard ("data ranks"); gradients are summed over replicate × shard × cp.

Under local updating (`optim.local`) the processes are divided into islands first, outermost of all: every island has the axes
above to itself, and trains on its part of the global batch.

The experts of mixtures see the same ranks of a stage in another way, again from the outermost to the innermost:

    expert_copies   ranks that hold the same part of the same experts
    expert_weights  ZeRO sharding: ranks that each hold a part of the same experts
    ep              expert parallelism: ranks that hold other experts, and send each other tokens

Every rank of a stage has tokens of its own (of a tensor-parallel rank: its slice of the sequence), so an expert's gradient
is summed over expert_copies × expert_weights. What the ranks along ep send it comes with the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..config.problems import ConfigError, Problem
from ..config.words import counted
from ..optim.local.config import LocalConfig
from .config import ParallelConfig

SIZES = ("replicate", "tp", "pp", "cp", "ep", "zero")
"""Keys of `parallel` that a layout is made of."""
AXES = ("pp", "replicate", "shard", "cp", "tp")
ISLAND = "island"
EXPERT_AXES = ("pp", "expert_copies", "expert_weights", "ep")


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes of a run. The product of AXES, as that of EXPERT_AXES, is the number of processes of an island.

    All numbers but `world_size` are those of one island; a run without local updating is one.
    """

    pp: int = 1
    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1
    zero: int = 3
    ep: int = 1
    islands: int = 1

    @property
    def stage_ranks(self) -> int:
        """Number of ranks of one pipeline stage."""
        return self.replicate * self.shard * self.cp * self.tp

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.islands * self.island_ranks

    @property
    def island_ranks(self) -> int:
        """Number of processes of one island."""
        return self.pp * self.stage_ranks

    @property
    def data_size(self) -> int:
        """Number of shares a global batch is dealt into."""
        return self.replicate * self.shard

    @property
    def gradient_ranks(self) -> int:
        """Number of ranks that a gradient is summed over."""
        return self.data_size * self.cp

    @property
    def weight_ranks(self) -> int:
        """Number of ranks that share one copy of a weight's state: under ZeRO-0 each has its own."""
        return self.shard * self.cp if self.zero else 1

    @property
    def expert_weights(self) -> int:
        """Number of ranks that share one copy of an expert's state: under ZeRO-0 each has its own."""
        return self.shard * self.cp * self.tp // self.ep if self.zero else 1

    @property
    def expert_copies(self) -> int:
        """Number of ranks that hold the same part of the same experts."""
        return self.stage_ranks // (self.ep * self.expert_weights)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name → size, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def expert_sizes(self) -> dict[str, int]:
        """Axis name → size of the axes as experts see them, outermost first."""
        return {axis: getattr(self, axis) for axis in EXPERT_AXES}

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return axis name → this rank's index along it."""
        return _indices(rank, {ISLAND: self.islands, **self.sizes})

    def of_one_island(self) -> Layout:
        """Return the layout of one island by itself."""
        return replace(self, islands=1)

    def expert_coordinates(self, rank: int) -> dict[str, int]:
        """Return the same along the axes as experts see them."""
        return _indices(rank, self.expert_sizes)

    def data_rank(self, rank: int) -> int:
        """Return the index of the share of the global batch that this rank works on, in [0, data_size)."""
        at = self.coordinates(rank)
        return at["replicate"] * self.shard + at["shard"]

    def describe(self) -> str:
        """Describe the layout in one line for logs: the axes larger than one, and the ZeRO stage of several processes."""
        axes, experts = (
            " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
            for sizes in (self.sizes, {axis: size for axis, size in self.expert_sizes.items() if axis != "pp"})
        )
        told = f"; experts: {experts}" if self.ep > 1 else ""
        one = f"{axes}, ZeRO-{self.zero}{told}" if axes else "one process"
        return one if self.islands == 1 else f"{self.islands} islands, each {one}"

    @classmethod
    def plan(cls, config: ParallelConfig, world_size: int, islands: int = 1) -> Layout:
        """Derive the layout that a config asks for on this many processes, in so many islands.

        Raises ConfigError naming every key that has to change.
        """
        problems = layout_problems(config, world_size, islands)
        if problems:
            raise ConfigError(problems)
        data = world_size // (islands * config.pp * config.cp * config.tp)
        replicate = data if config.zero == 0 else config.replicate
        return cls(config.pp, replicate, data // replicate, config.cp, config.tp, config.zero, config.ep, islands)


def _indices(rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return a rank's index along each axis. sizes: outermost first."""
    found: dict[str, int] = {}
    for axis, size in reversed(list(sizes.items())):
        rank, found[axis] = divmod(rank, size)
    return {axis: found[axis] for axis in sizes}


def uses_fsdp(parallel: ParallelConfig, layout: Layout, *, experts: bool = False) -> bool:
    """Return whether FSDP2 holds the torch engine's weights; otherwise they are whole beside sharded masters (`masters.py`).

    experts: asks of those of experts under expert parallelism, which other ranks share.
    """
    ranks = layout.expert_copies * layout.expert_weights if experts else layout.gradient_ranks
    return parallel.pp > 1 or parallel.offload == "cpu" or (layout.zero >= 2 and ranks > 1)


def layout_problems(config: ParallelConfig, world_size: int, islands: int = 1) -> list[Problem]:
    """List what is wrong with the axis sizes on this many processes, in so many islands."""
    problems = config.problems_of(*SIZES)
    if problems:
        return problems
    if world_size % islands:
        message = f"{counted(world_size, 'process')} can't be divided into {islands} islands of equal size"
        fits = " or ".join(str(n * islands) for n in sorted({max(1, world_size // islands), -(-world_size // islands)}))
        fix = f"start {fits} processes; the number of islands is part of the recipe, and another one is another run"
        return [Problem("optim.local.islands", message, fix)]
    world_size //= islands
    model = config.pp * config.cp * config.tp
    if world_size % model:
        fits = list(range(model, 2 * max(world_size, model) + 1, model))[:3]
        problems.append(
            Problem(
                "parallel",
                f"pp {config.pp} × cp {config.cp} × tp {config.tp} = {model} does not divide {counted(world_size, 'process')}",
                f"start {' or '.join(map(str, fits))} processes, or change parallel.pp, parallel.cp or parallel.tp",
            )
        )
        return problems
    data = world_size // model
    if data % config.replicate:
        divisors = [n for n in range(1, data + 1) if data % n == 0]
        problems.append(
            Problem(
                "parallel.replicate",
                f"{config.replicate} groups can't share {data} data-parallel processes evenly",
                f"use one of {', '.join(map(str, divisors))}",
            )
        )
    elif config.zero == 0 and config.replicate not in (1, data):
        problems.append(
            Problem(
                "parallel.replicate",
                f"with parallel.zero=0 every one of the {data} data-parallel processes is a replica already",
                "leave parallel.replicate at 1, or use parallel.zero=1, 2 or 3 for hybrid sharding",
            )
        )
    problems += _expert_size_problems(config, data)
    return problems


def island_count(local: LocalConfig, config: ParallelConfig, world_size: int, full: int = 0) -> int:
    """Return how many islands so many processes make: the first number of `LocalConfig.counts` whose layout is legal.

    full: processes of the run with all of its islands; 0: not known. Where no layout is legal, returns `islands`.
    """
    legal = (count for count in local.counts(world_size, full) if not layout_problems(config, world_size, count))
    return next(legal, local.islands)


def _expert_size_problems(config: ParallelConfig, data: int) -> list[Problem]:
    """List what is wrong with `parallel.ep`. data: number of data-parallel ranks."""
    replicate = 1 if config.zero == 0 or data % config.replicate else config.replicate
    ranks = data // replicate * config.cp * config.tp
    if ranks % config.ep == 0:
        return []
    what = "ranks of a pipeline stage" if replicate == 1 else "ranks of a stage that hold one copy of the weights"
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    text = f"{config.ep} does not divide the {ranks} {what}"
    return [Problem("parallel.ep", text, f"use one of {', '.join(map(str, divisors))}")]
