"""Config of `optim.local`: islands that train by themselves, and the outer optimizer that joins them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config.keys import Side, key
from ...config.problems import Problem
from ..optimizers.bounds import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, bound_problems, choice_problems

AGGREGATES = ("mean", "geometric_median")
DTYPES = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class LocalConfig:
    """Local updating: see docs/local_updating.md. The defaults are DiLoCo's (arXiv 2311.08105), but for `islands`."""

    SIDE: ClassVar[Side] = Side.RECIPE

    islands: int = key(1, "groups of processes that exchange nothing in a step; 1: every step is taken together")
    quorum: int | None = key(None, "islands with which a run goes on that has lost others; null: all of them are needed")
    inner_steps: int = key(100, "steps that islands take by themselves between two outer steps of a weight")
    lr: float = key(0.7, "rate of the outer optimizer, SGD on the mean difference; 1 without momentum averages weights")
    momentum: float = key(0.9, "momentum of the outer optimizer")
    nesterov: bool = key(True, "Nesterov's momentum; false: heavy ball")
    fragments: int = key(1, "groups of layers that take their outer steps in turns, for fewer bytes at once")
    delay: int = key(0, "steps that islands go on while differences travel; inner_steps: one round late (CO2)")
    mix: float = key(0.0, "weight of an island's own weights where it takes over the outer ones, for steps taken in the delay")
    clip: float | None = key(None, "bound on each element of the outer momentum, as in CO2; null: none")
    aggregate: str = key(
        "mean", "of differences, by tokens: mean; geometric_median, which a minority of wrong islands moves by a bounded amount"
    )
    dtype: str = key("fp32", "in which differences travel: fp32 (the masters' own), bf16 or int8 (by blocks of 256)")

    @property
    def active(self) -> bool:
        """True if the run was configured with more than one island, even if only one is left."""
        return self.islands > 1

    def counts(self, processes: int, full: int = 0) -> list[int]:
        """List the island counts to try, best first: the one that keeps the islands' size, then the largest.

        full: processes of the run with all of its islands; 0: not known. Islands so keep to their machines where one is lost.
        """
        most_first = list(range(self.islands, self.fewest - 1, -1))
        of_their_size = processes * self.islands / full if full else 0
        return sorted(most_first, key=lambda count: count != of_their_size)

    @property
    def fewest(self) -> int:
        """The smallest number of islands with which the run goes on."""
        return self.islands if self.quorum is None else min(self.quorum, self.islands)

    @property
    def arrays(self) -> int:
        """Arrays of the weights' shape that are kept between steps, beside the weights and the inner optimizer's."""
        return self.common_arrays + bool(self.delay) if self.active else 0

    @property
    def common_arrays(self) -> int:
        """Those of them that are the same on all islands: the outer weights and their momentum."""
        return 1 + bool(self.momentum) if self.active else 0

    def problems(self, key: str = "optim.local") -> list[Problem]:
        """Return what is wrong with the values."""
        found = bound_problems(key, COUNT, islands=self.islands, inner_steps=self.inner_steps, fragments=self.fragments)
        if self.quorum is not None:
            found += bound_problems(key, COUNT, quorum=self.quorum)
        found += bound_problems(key, POSITIVE, lr=self.lr)
        found += bound_problems(key, FRACTION, momentum=self.momentum, mix=self.mix)
        found += bound_problems(key, NOT_NEGATIVE, delay=self.delay)
        found += choice_problems(key, "dtype", self.dtype, DTYPES)
        found += choice_problems(key, "aggregate", self.aggregate, AGGREGATES)
        if self.clip is not None:
            found += bound_problems(key, POSITIVE, clip=self.clip)
        if found:
            return found
        if self.quorum is not None and self.active and self.quorum > self.islands:
            message = f"{self.quorum} islands are more than there are"
            found.append(Problem(f"{key}.quorum", message, f"use {self.islands} at most"))
        if self.clip is not None and not self.momentum:
            found.append(Problem(f"{key}.clip", "there is no momentum", f"use {key}.clip=null, or {key}.momentum=0.2"))
        if self.aggregate != "mean" and self.active and self.fewest < 3:
            message = "of two islands nobody can tell which is wrong"
            fewest = "islands" if self.islands < 3 else "quorum"
            found.append(Problem(f"{key}.aggregate", message, f"use {key}.aggregate=mean, or {key}.{fewest}=3 or more"))
        if self.nesterov and not self.momentum:
            found.append(Problem(f"{key}.nesterov", "there is no momentum", f"use {key}.nesterov=false, or {key}.momentum=0.9"))
        if self.fragments > self.inner_steps:
            message = f"{self.fragments} do not fit into a round of {self.inner_steps} steps, one after another"
            found.append(Problem(f"{key}.fragments", message, f"use {self.inner_steps} at most"))
        if self.delay > self.inner_steps:
            message = f"differences would still travel after {self.inner_steps} steps, when the next ones leave"
            found.append(Problem(f"{key}.delay", message, f"use {self.inner_steps} at most, or raise {key}.inner_steps"))
        elif self.mix and self.delay in (0, self.inner_steps):
            message = "no step is kept apart" if not self.delay else "a round's steps would count twice"
            fix = f"use {key}.mix=0, or a {key}.delay between 0 and {self.inner_steps}"
            found.append(Problem(f"{key}.mix", f"with {key}.delay={self.delay} {message}", fix))
        return found


SYNCHRONOUS = LocalConfig()
"""Every step is taken by all processes together."""
