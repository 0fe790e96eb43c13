"""bf16 weights that are all that is kept: their fp32 masters exist only during an update.

Before an update the masters' memory is taken, and filled from the bf16 weights. The optimizer updates them as ever. Then they
are rounded back into the weights, and their memory is freed. An optimizer that is a `RoundedStep` does all of it element by
element, and masters never have memory. A step is mostly smaller than a bf16 number's spacing, so rounding to the nearest would
lose it. Two ways keep it:

bf16_stochastic  rounds up or down by chance, so that the mean is exact (arXiv 2010.06192); drawn by seed, weight, number of
                 the update (one that is skipped counts, too) and position in the whole weight: the same on every layout
bf16_kahan       keeps what rounding leaves, as a second bf16 number, and adds it to the next update
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import xxhash

from ...kernels.random_bits import BoxIndex
from ...kernels.rounding import KeptWeight, round_stochastic, split_in_two
from ..fragment import REMAINDER, Fragment
from .strategy import LocalWeight

ROUNDINGS = "roundings"


class RoundedMasters:
    """The masters of one group's weights. They exist at first, for the initial values.

    weights   by name; `tensor` is the master, `compute_copy` the bf16 weight
    counters  the number of roundings, the same for every group, where they are drawn by it; set after a restore
    """

    def __init__(self, weights: Mapping[str, LocalWeight], kind: str, seed: int) -> None:
        """kind: bf16_stochastic or bf16_kahan; seed: of the rounding."""
        self._seed = seed
        self._weights = {name: (weight, _copy_of(weight)) for name, weight in weights.items()}
        self._exist = True
        self._remainders = {name: torch.zeros_like(copy) for name, (_, copy) in self._weights.items() if kind == "bf16_kahan"}
        self.counters: dict[str, float] = {} if kind == "bf16_kahan" else {ROUNDINGS: 0}

    @torch.no_grad()
    def make(self) -> None:
        """Take the masters' memory, and fill it from what is kept."""
        if self._exist:
            return
        for name, (weight, copy) in self._weights.items():
            storage = weight.tensor.untyped_storage()
            storage.resize_(weight.tensor.numel() * weight.tensor.element_size())
            weight.tensor.copy_(copy)
            if self._remainders:
                weight.tensor.add_(self._remainders[name])
        self._exist = True

    @torch.no_grad()
    def round(self) -> None:
        """Round the masters into what is kept, if they exist, and free their memory."""
        if not self._exist:
            return
        number = int(self.counters.get(ROUNDINGS, 0))
        for name, (weight, copy) in self._weights.items():
            master = weight.tensor.detach()
            if self._remainders:
                split_in_two(master, copy, self._remainders[name])
            else:
                placed = weight.placed
                place = {"global_shape": placed.global_shape, "offsets": placed.box.offsets}
                round_stochastic(master, copy, key=self._key(name, number), **place)
            weight.tensor.untyped_storage().resize_(0)
        self.counters = dict.fromkeys(self.counters, number + 1)
        self._exist = False

    def kept(self) -> dict[torch.Tensor, KeptWeight]:
        """Return what an update without masters reads and writes, by master; it counts as a rounding.

        Empty where masters exist, or a weight's rows are not evenly apart in the whole one: then the update needs masters.
        """
        number, found = int(self.counters.get(ROUNDINGS, 0)), dict[torch.Tensor, KeptWeight]()
        for name, (weight, copy) in self._weights.items():
            placed = weight.placed
            box = BoxIndex.of(tuple(copy.shape), placed.global_shape, placed.box.offsets)
            if self._exist or box is None:
                return {}
            found[weight.tensor] = KeptWeight(copy, self._remainders.get(name), self._key(name, number), box)
        self.counters = dict.fromkeys(self.counters, number + 1)
        return found

    def _key(self, name: str, number: int) -> int:
        """Return the key of the bits drawn for a weight in a rounding."""
        return xxhash.xxh3_64_intdigest(f"{self._seed}/rounding/{number}/{name}".encode())

    def fragments(self) -> Iterator[Fragment]:
        """Yield the remainders."""
        self.round()
        for name, remainder in self._remainders.items():
            placed = self._weights[name][0].placed
            if placed.box.numel:
                yield Fragment(name, REMAINDER, placed.global_shape, placed.box, remainder)


def _copy_of(weight: LocalWeight) -> torch.Tensor:
    assert weight.compute_copy is not None, "masters of the weights' own dtype need no rounding"
    return weight.compute_copy
