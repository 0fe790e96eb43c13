"""Rebuild layers that a step has lost from the layers beside them: CheckFree (arXiv 2506.15461).

A pipeline's stage writes its layers into files of its own. Where these files are gone, the layers in them become weighted means
of as many layers before and behind them. A file that is there is never replaced: what it holds may be good.

The paper's weights are squared norms of the neighbouring stages' gradients. Adam's second moments are averages of squared
gradients, so their sum is that norm, averaged over some steps in place of the last.

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
from .control import Round
from .dtypes import TORCH_DTYPES, as_tensor
from .errors import CheckpointError, DamageError, UnreadableError
from .files import Files
from .folder import raise_first
from .manifest import Manifest, StoredArray
from .reading.items import Raw
from .reading.reader import Reader
from .tools import verify_file

SECOND_MOMENT = "exp_avg_sq"
MEANS = ("weight", SECOND_MOMENT)
"""Roles of arrays that are rebuilt as means."""
ZEROS = ("exp_avg", "momentum", "momentum_buffer")
"""Roles of arrays that begin at zero."""
KindOf = Callable[[int], str]
"""Names the kind of a layer, such as "full" or "sliding", by its number: others can't replace it."""
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
    """The arrays that are read in the place of lost ones.

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


def agree_on_rebuilding(
    open_step: Callable[[], OpenedStep], roles_of: Callable[[Manifest], set[str]], kind_of: KindOf, talk: Round
) -> tuple[RebuildPlan, list[str]]:
    """Find the files that a step has lost, each rank among those dealt to it by number, and plan what replaces their arrays.

    roles_of: of the arrays of the step that this rank wants

    Returns the plan, the same on all ranks, and the damage. Raises CheckpointError on all of them if it can't be rebuilt.
    """
    step: OpenedStep | None = None
    try:
        step = open_step()
        lost, damaged = lost_files(step.files, step.manifest, talk.control.rank, talk.control.world_size)
        mine: dict[str, Any] = {"lost": lost, "damaged": damaged, "roles": sorted(roles_of(step.manifest))}
    except CheckpointError as error:
        mine = {"refused": str(error)}
    except BaseException as error:
        talk.abort(f"looking for lost files failed: {type(error).__name__}: {error}")
        raise

    def decide(joined: bytes) -> bytes:
        answer = json.loads(joined)
        if "refused" not in answer:
            assert step is not None
            numbers = [int(number) for number in answer["lost"]]
            try:
                _refuse_damaged(step.files, answer["damaged"])
                answer["plan"] = asdict(plan_rebuilding(step.files, step.manifest, numbers, answer["roles"], kind_of))
            except CheckpointError as error:
                answer = {"refused": str(error)}
            except BaseException as error:  # the others wait for a word
                talk.abort(f"planning what replaces lost layers failed: {type(error).__name__}: {error}")
                raise
        return json.dumps(answer).encode()

    answer = json.loads(talk.agree("lost", json.dumps(mine).encode(), _join_losses, decide))
    if "refused" in answer:
        raise CheckpointError(answer["refused"])
    return RebuildPlan.from_json(answer["plan"]), list(answer["lost"].values())


def _join_losses(messages: Sequence[bytes]) -> bytes:
    """Join what several ranks have found: a refusal counts most."""
    answers: list[dict[str, Any]] = [json.loads(message) for message in messages]
    refusal = next((answer for answer in answers if "refused" in answer), None)
    if refusal is not None:
        return json.dumps(refusal).encode()
    lost = {number: what for answer in answers for number, what in answer["lost"].items()}
    damaged = list(dict.fromkeys(what for answer in answers for what in answer["damaged"]))  # a host's file is told of once
    roles = sorted({role for answer in answers for role in answer["roles"]})
    return json.dumps({"lost": lost, "damaged": damaged, "roles": roles}).encode()


def lost_files(files: Files, manifest: Manifest, rank: int, world_size: int) -> tuple[dict[int, str], list[str]]:
    """Read this rank's share of a step's files.

    Returns the numbers of those that are missing, with the damage, and a description of each that is there and not whole.
    Raises UnreadableError if that can't be told.
    """
    sizes, reader = files.sizes(), Reader(files, manifest)
    reader.whole_files = False
    lost: dict[int, str] = {}
    damaged: list[str] = []
    for number in range(rank, len(manifest.files), world_size):
        file, found = manifest.files[number], list(verify_file(reader, number, sizes))
        raise_first(each for each in found if isinstance(each, UnreadableError))  # it need not be lost
        faults = [each for each in found if isinstance(each, DamageError)]
        if sizes.get(file.name) is None:
            lost[number] = str(faults[0])
        elif faults:
            of_data = [fault for fault in faults if fault.file in (files.label(file.name), files.label(file.title))]
            blocks = sum(fault.block is not None for fault in of_data)
            rest = f" ({blocks} of {len(found)} blocks)" if blocks else "" if of_data else ", but the data are whole"
            damaged.append(f"{(of_data or faults)[0]}{rest}")
    return lost, damaged


def _refuse_damaged(files: Files, damaged: Sequence[str]) -> None:
    """Raise CheckpointError if a file is there and not whole: what is good in it would be replaced, too."""
    if damaged:
        more = f"; and {len(damaged) - 4} more" if len(damaged) > 4 else ""
        raise CheckpointError(
            f"{'; '.join(damaged[:4])}{more}. checkpoint.lost_layers replaces no file that is there, with what is"
            f" good in it. Resume from another step; or move such files out of {files.label()}, so that they count as lost"
        )


def plan_rebuilding(
    files: Files, manifest: Manifest, lost: Collection[int], roles: Collection[str], kind_of: KindOf
) -> RebuildPlan:
    """Plan what becomes of the arrays of these roles that have a part in a lost file. lost: numbers of these files

    Raises CheckpointError, with their names, for arrays that are of no layer, for layers of which a part is left, or that have
    none of their kind before or behind them, and for state of an optimizer that is not known here.
    """
    absent, torn = _absent(manifest, {manifest.files[number].rank for number in lost})
    refused: list[str] = []
    gone: dict[str, set[int]] = {}
    for key, array in absent.items():
        match = _LAYER.fullmatch(array.name)
        if array.role not in roles:
            continue
        if match is None:
            refused.append(f"{key} is of no layer that has neighbours")
        elif array.role not in (*MEANS, *ZEROS):
            refused.append(f"{key} is state of a kind that is not rebuilt")
        else:
            gone.setdefault(match["stack"], set()).add(int(match["number"]))
    wanted = [array for array in manifest.arrays.values() if array.role in roles]
    for stack, numbers in sorted(gone.items()):
        for number in sorted(numbers):
            own = [array.key for array in wanted if _is_of(array, stack, [number])]
            left = [key for key in own if key not in absent or key in torn]
            if left:
                refused.append(f"{stack}.{number} is lost only in part: files that are there have {_left(left)}")
    layers: list[RebuiltLayers] = []
    stacks = _layers_of(array.name for array in wanted)
    for stack, numbers in sorted(gone.items()):
        for block in _blocks(numbers):
            try:
                before, behind = _neighbours(stack, block, stacks[stack] - numbers, kind_of)
            except CheckpointError as error:
                refused.append(str(error))
                continue
            layers.append(RebuiltLayers(stack, block, before, behind, [], ""))
    if refused:
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        named = "; ".join(refused[:4]) + more
        raise CheckpointError(f"{files.label()}: what it has lost can't be rebuilt: {named}. Resume from another step")
    layers = [_weighted(files, manifest, absent, each) for each in layers]
    replaced = {key: array for key, array in absent.items() if array.role in roles}
    return RebuildPlan(layers, {key: _parts(manifest, array, layers) for key, array in replaced.items()})


def _absent(manifest: Manifest, ranks: Collection[int]) -> tuple[dict[str, StoredArray], set[str]]:
    """Return the arrays that have a part in the files of these ranks, and the keys of those with another part elsewhere."""
    absent: dict[str, StoredArray] = {}
    torn: set[str] = set()
    for key, array in manifest.arrays.items():
        lost = {rank in ranks for rank, _ in manifest.tilings[array.tiling].parts(array.item_bytes, array.turn)}
        if True in lost:
            absent[key] = array
        if len(lost) > 1:
            torn.add(key)
    return absent, torn


def _left(keys: Sequence[str]) -> str:
    """Word what is left of a layer."""
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more arrays, or parts of them"


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


def _neighbours(stack: str, block: Sequence[int], whole: Collection[int], kind_of: KindOf) -> tuple[list[int], list[int]]:
    """Return the layer before and the layer behind that each of a block is made of: those at its place in the block beside.

    Where that one is lost, absent or of another kind, the nearest to it that is not. Raises CheckpointError if there is none.
    """
    before: list[int] = []
    behind: list[int] = []
    for number in block:
        like = [each for each in whole if kind_of(each) == kind_of(number)]
        for found, side, step in ((before, "before", -1), (behind, "behind", 1)):
            place, edge = number + step * len(block), block[0] if step < 0 else block[-1]
            there = [each for each in like if (each - edge) * step > 0]
            if not there:
                raise CheckpointError(f"{stack}.{number} has no layer of its kind ({kind_of(number)}) {side} it")
            found.append(min(there, key=lambda each, place=place, step=step: (abs(each - place), each * step)))
    return before, behind


def _weighted(files: Files, manifest: Manifest, absent: Collection[str], layers: RebuiltLayers) -> RebuiltLayers:
    """Give the layers before and behind their shares, by the sums of their second moments, each as often as it is used."""
    sums: list[float] = []
    for numbers in (layers.before, layers.behind):
        total = 0.0
        for number in sorted(set(numbers)):
            arrays = [array for array in manifest.arrays.values() if _is_of(array, layers.stack, [number])]
            moments = {array.name: array for array in arrays if array.role == SECOND_MOMENT and array.key not in absent}
            weights = {array.name: array.shape for array in arrays if array.role == "weight"}
            if {name: array.shape for name, array in moments.items()} != weights:
                return replace(layers, shares=[0.5, 0.5], by="halves: there are no second moments of all weights")
            total += numbers.count(number) * _sum(files, manifest, list(moments.values()))
        sums.append(total)
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
    reader = Reader(files, manifest)
    reader.whole_files = False
    return math.fsum(float(as_tensor(raw, dtypes[number]).double().sum()) for number, _, raw in reader.stream(pairs))


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
