"""Rebuild layers that a step has lost from the layers beside them: CheckFree (arXiv 2506.15461).

A pipeline's stage writes its layers into files of its own. Where such a file is lost, the layers in it become weighted means
of as many layers before and behind them. The paper's weights are squared norms of the neighbouring stages' gradients. Adam's
second moments are averages of squared gradients, so their sum is that norm, averaged over some steps in place of the last.

First moments begin at zero, as the paper's fresh optimizer does. Second moments are means, too: steps are counted once for the
whole optimizer, and moments of zero would be taken for long averages, which makes the first updates several times too large.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from ..parallel.box import Box
from ..parallel.fragment import REMAINDER
from .control import Round
from .dtypes import TORCH_DTYPES, as_tensor
from .errors import CheckpointError, DamageError
from .files import Files
from .manifest import Manifest, StoredArray
from .reading.reader import Raw, Reader
from .tools import verify_file

SECOND_MOMENT = "exp_avg_sq"
MEANS = ("weight", SECOND_MOMENT)
"""Roles of arrays that are rebuilt as means."""
ZEROS = ("exp_avg", "momentum", REMAINDER)
"""Roles of arrays that begin at zero."""
_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<number>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class RebuiltLayers:
    """Consecutive layers that were lost, and what they are made of.

    stack   name of what they are layers of: "layers"
    lost    their numbers; before, behind: those of the layers that each is the mean of
    shares  of the layers before and behind in the mean
    by      "second moments", which the shares follow, or why they are halves
    """

    stack: str
    lost: list[int]
    before: list[int]
    behind: list[int]
    shares: list[float]
    by: str

    def describe(self) -> str:
        """Return what was rebuilt from what, in a few words."""
        first, last = self.lost[0], self.lost[-1]
        lost = f"{self.stack}.{first}" if first == last else f"{self.stack}.{first} to {last}"
        sources = f"{', '.join(map(str, sorted(set(self.before))))} and {', '.join(map(str, sorted(set(self.behind))))}"
        return f"{lost} from {sources} ({self.shares[0]:.2f} and {self.shares[1]:.2f}, by {self.by})"


@dataclass(frozen=True)
class RebuildPlan:
    """What is read in the place of lost arrays.

    layers  that are rebuilt
    parts   key of a lost array → keys of those that it is the mean of, with their shares; none: it begins at zero
    """

    layers: list[RebuiltLayers]
    parts: dict[str, list[tuple[str, float]]]

    def reads(self, manifest: Manifest, array: StoredArray) -> list[StoredArray]:
        """Return the arrays that are read for one: itself, unless it is lost."""
        return [array] if array.key not in self.parts else [manifest.arrays[key] for key, _ in self.parts[array.key]]

    def value(self, array: StoredArray, box: Box, raws: Iterator[Raw]) -> torch.Tensor:
        """Return the values of a box of an array, from the boxes that `reads` asked for. Means are taken in float64."""
        if array.key not in self.parts:
            return as_tensor(next(raws), array.dtype)
        total = torch.zeros(box.shape, dtype=torch.float64)
        for _, share in self.parts[array.key]:
            total += share * as_tensor(next(raws), array.dtype).double()
        return total.to(TORCH_DTYPES[array.dtype])

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RebuildPlan:
        """Return the plan whose fields these are, from JSON."""
        parts = {key: [(source, share) for source, share in each] for key, each in content["parts"].items()}
        return cls([RebuiltLayers(**each) for each in content["layers"]], parts)


NOTHING_LOST = RebuildPlan([], {})


class OpenedStep(Protocol):
    """A step whose manifest is right."""

    files: Files
    manifest: Manifest


def agree_on_rebuilding(open_step: Callable[[], OpenedStep], talk: Round) -> tuple[RebuildPlan, list[str]]:
    """Find the files that a step has lost, each rank in a share of them, and plan what takes the place of their arrays.

    Returns the plan, the same on all ranks, and the damage. Raises CheckpointError on all of them if it can't be rebuilt.
    """
    step: OpenedStep | None = None
    try:
        step = open_step()
        mine: dict[str, Any] = {"lost": lost_files(step.files, step.manifest, talk.control.rank, talk.control.world_size)}
    except CheckpointError as error:
        mine = {"refused": str(error)}
    except BaseException as error:
        talk.abort(f"looking for lost files failed: {type(error).__name__}: {error}")
        raise

    def decide(joined: bytes) -> bytes:
        answer = json.loads(joined)
        if "refused" not in answer:
            assert step is not None
            try:
                answer["plan"] = asdict(plan_rebuilding(step.files, step.manifest, [int(n) for n in answer["lost"]]))
            except CheckpointError as error:
                answer = {"refused": str(error)}
        return json.dumps(answer).encode()

    answer = json.loads(talk.agree("lost", json.dumps(mine).encode(), _join_losses, decide))
    if "refused" in answer:
        raise CheckpointError(answer["refused"])
    return RebuildPlan.from_json(answer["plan"]), list(answer["lost"].values())


def _join_losses(messages: Sequence[bytes]) -> bytes:
    """Join what several ranks have found: a refusal counts most."""
    answers: list[dict[str, Any]] = [json.loads(message) for message in messages]
    refusal = next((answer for answer in answers if "refused" in answer), None)
    lost = {number: what for answer in answers for number, what in answer.get("lost", {}).items()}
    return json.dumps(refusal or {"lost": lost}).encode()


def lost_files(files: Files, manifest: Manifest, rank: int, world_size: int) -> dict[int, str]:
    """Read this rank's share of a step's files. Return the numbers of those that are lost or damaged, with the damage."""
    sizes, reader = files.sizes(), Reader(files, manifest)
    found: dict[int, str] = {}
    for number in range(rank, len(manifest.files), world_size):
        fault = next((str(each) for each in verify_file(reader, number, sizes) if isinstance(each, DamageError)), None)
        if fault is not None:
            found[number] = fault
    return found


def plan_rebuilding(files: Files, manifest: Manifest, lost: Collection[int]) -> RebuildPlan:
    """Plan what becomes of the arrays that have a part in a lost file. lost: numbers of these files

    Raises CheckpointError, with their names, for arrays that are of no layer, for layers without one before or behind them,
    and for state of an optimizer that is not known here.
    """
    ranks = {manifest.files[number].rank for number in lost}
    absent = {
        key: array
        for key, array in manifest.arrays.items()
        if any(rank in ranks for rank, _ in manifest.tilings[array.tiling].parts(array.item_bytes, array.turn))
    }
    stacks = _layers_of(array.name for array in manifest.arrays.values())
    refused: list[str] = []
    gone: dict[str, set[int]] = {}
    for key, array in absent.items():
        match = _LAYER.fullmatch(array.name)
        if match is None:
            refused.append(f"{key} is of no layer that has neighbours")
        elif array.role not in (*MEANS, *ZEROS):
            refused.append(f"{key} is state of a kind that is not rebuilt")
        else:
            gone.setdefault(match["stack"], set()).add(int(match["number"]))
    layers: list[RebuiltLayers] = []
    for stack, numbers in sorted(gone.items()):
        for block in _blocks(numbers):
            before, behind = _neighbours(block, stacks[stack] - numbers)
            if before and behind:
                layers.append(_weighted(files, manifest, RebuiltLayers(stack, block, before, behind, [], "")))
            else:
                refused.append(f"{stack}.{block[0]} has no layer {'behind' if before else 'before'} it")
    if refused:
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        named = "; ".join(refused[:4]) + more
        raise CheckpointError(f"{files.label()}: what it has lost can't be rebuilt: {named}. Resume from another step")
    return RebuildPlan(layers, {key: _parts(manifest, array, layers) for key, array in absent.items()})


def _layers_of(names: Iterable[str]) -> dict[str, set[int]]:
    """Return the numbers of the layers of each stack."""
    found: dict[str, set[int]] = {}
    for match in filter(None, map(_LAYER.fullmatch, names)):
        found.setdefault(match["stack"], set()).add(int(match["number"]))
    return found


def _blocks(numbers: Collection[int]) -> list[list[int]]:
    """Cut layers into runs of consecutive ones."""
    runs = itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    return [[number for _, number in run] for _, run in runs]


def _neighbours(block: Sequence[int], whole: Collection[int]) -> tuple[list[int], list[int]]:
    """Return the layer before and the layer behind that each of a block is made of: those at its place in the block beside.

    Where fewer whole layers stand there, the outermost takes the place of those beyond it. Empty: there is none.
    """
    count, first, last = len(block), block[0], block[-1]
    before = list(itertools.takewhile(lambda number: number in whole, range(first - 1, first - 1 - count, -1)))
    behind = list(itertools.takewhile(lambda number: number in whole, range(last + 1, last + 1 + count)))
    if not before or not behind:
        return before, behind
    return [max(first - count + at, before[-1]) for at in range(count)], [min(last + 1 + at, behind[-1]) for at in range(count)]


def _weighted(files: Files, manifest: Manifest, layers: RebuiltLayers) -> RebuiltLayers:
    """Give the layers before and behind their shares, by the sums of their second moments."""
    sums: list[float] = []
    for numbers in (layers.before, layers.behind):
        arrays = [array for array in manifest.arrays.values() if _is_of(array, layers.stack, numbers)]
        moments = {array.name: array for array in arrays if array.role == SECOND_MOMENT}
        weights = {array.name: array.shape for array in arrays if array.role == "weight"}
        if {name: array.shape for name, array in moments.items()} != weights:
            return replace(layers, shares=[0.5, 0.5], by="halves: the optimizer keeps no second moments of all weights")
        sums.append(_sum(files, manifest, list(moments.values())))
    total = math.fsum(sums)
    if not (math.isfinite(total) and total > 0):
        return replace(layers, shares=[0.5, 0.5], by="halves: the second moments have no finite sum")
    return replace(layers, shares=[each / total for each in sums], by="second moments")


def _is_of(array: StoredArray, stack: str, numbers: Collection[int]) -> bool:
    match = _LAYER.fullmatch(array.name)
    return match is not None and match["stack"] == stack and int(match["number"]) in numbers


def _sum(files: Files, manifest: Manifest, arrays: Sequence[StoredArray]) -> float:
    """Sum the elements of arrays, in float64, with a part of one in memory at a time."""
    pairs = [(array, Box.whole(array.shape)) for array in arrays]
    dtypes = [array.dtype for array in arrays]
    return math.fsum(
        float(as_tensor(raw, dtypes[number]).double().sum()) for number, _, raw in Reader(files, manifest).stream(pairs)
    )


def _parts(manifest: Manifest, array: StoredArray, layers: Sequence[RebuiltLayers]) -> list[tuple[str, float]]:
    """Return what a lost array is the mean of, with the shares. Raises CheckpointError if these are of another shape."""
    if array.role in ZEROS:
        return []
    match = _LAYER.fullmatch(array.name)
    assert match is not None
    stack, number = match["stack"], int(match["number"])
    block = next(each for each in layers if each.stack == stack and number in each.lost)
    place = block.lost.index(number)
    found: list[tuple[str, float]] = []
    for neighbour, share in zip((block.before[place], block.behind[place]), block.shares, strict=True):
        key = f"{array.role}/{stack}.{neighbour}.{match['rest']}"
        other = manifest.arrays.get(key)
        if other is None or (other.shape, other.dtype) != (array.shape, array.dtype):
            raise CheckpointError(f"{array.key} is lost, and {key} is not like it: layers of other kinds can't replace it")
        found.append((key, share))
    return found
