"""Average the weights of several steps into a checkpoint to go on from, to evaluate or to export.

Late steps of one run average well (Izmailov et al., arXiv 1803.05407), in a stable phase almost as if the rate had decayed
(Hägele et al., arXiv 2405.18392).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...parallel.box import Box
from ..dtypes import TORCH_DTYPES, as_tensor
from ..errors import CheckpointError
from ..files import Files
from ..folder import open_step
from ..manifest import Manifest
from ..reading.compare import parts
from ..reading.reader import Reader
from .compose import Source, compose
from .inherited import inherit_tokenizer

GROUPS = ("model", "data")
"""Groups of the first step's config that go on: what `generate` needs to know."""


def average(
    steps: Sequence[Files], folder: str | Path, weights: Sequence[float] | None = None, *, overwrite: bool = False
) -> Path:
    """Write a checkpoint (step 0, weights only) whose weights are the mean of those of several steps of one model.

    It stands for the first of them in all else. Sums are taken in float64. Host memory holds a part of an array at a time.

    weights: of the steps in the mean, in any unit; None: alike

    Raises CheckpointError for steps whose models differ, and for weights that are none.
    """
    given = _checked_weights(len(steps), weights)
    opened = [(files, open_step(files)) for files in steps]
    first, manifest = opened[0]
    for files, other in opened[1:]:
        _refuse_another_model(first, manifest, files, other)
    readers = [Reader(files, each) for files, each in opened]
    sources = [
        Source(
            array.name,
            "weight",
            TORCH_DTYPES[array.dtype],
            array.shape,
            functools.partial(_mean, readers, given, array.key, box, TORCH_DTYPES[array.dtype]),
            box=box,
        )
        for array in manifest.arrays.values()
        if array.role == "weight"
        for box in parts(array)
    ]
    config: dict[str, Any] = manifest.state.get("config", {})
    tokenizer = inherit_tokenizer(first, manifest.state)
    how = {"average_of": [files.label() for files in steps], "weights": given}
    state = {
        "config": {name: config[name] for name in GROUPS if name in config},
        "imported_from": {"format": "average", **manifest.state.get("imported_from", {}), **how},
        **tokenizer.state,
    }
    return compose(folder, 0, sources, state, tokenizer.files, overwrite=overwrite)


def _checked_weights(count: int, weights: Sequence[float] | None) -> list[float]:
    """Return the weight of each step."""
    if count < 2:
        raise CheckpointError("one step has no average; give two or more, or --last 2 or more")
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count:
        raise CheckpointError(f"there are {len(given)} weights for {count} steps; give one for each")
    if not all(0 <= each < math.inf for each in given) or not any(given):
        raise CheckpointError(f"{' '.join(f'{each:g}' for each in given)} are no weights; use 0 or more, not all of them 0")
    return given


def _refuse_another_model(first: Files, manifest: Manifest, files: Files, other: Manifest) -> None:
    """Raise CheckpointError if two steps have weights of other names or shapes, or were trained with another tokenizer."""
    mine, theirs = (
        {key: array.shape for key, array in each.arrays.items() if array.role == "weight"} for each in (manifest, other)
    )
    unlike = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    if unlike:
        named = f"{', '.join(unlike[:3])}{', …' if len(unlike) > 3 else ''}"
        raise CheckpointError(f"{files.label()} is of another model than {first.label()}: {named}")
    tokenizers = {each.state["tokenizer"] for each in (manifest, other) if each.state.get("tokenizer") is not None}
    if len(tokenizers) > 1:
        raise CheckpointError(f"{files.label()} was trained with another tokenizer than {first.label()}")


def _mean(readers: Sequence[Reader], weights: Sequence[float], key: str, box: Box, dtype: torch.dtype) -> torch.Tensor:
    """Return the mean of a box of one array. It is divided once, so that no share is rounded before."""
    total = torch.zeros(box.shape, dtype=torch.float64)
    for reader, weight in zip(readers, weights, strict=True):
        if weight:
            array = reader.manifest.arrays[key]
            total += weight * as_tensor(reader.read([(array, box)])[0], array.dtype).double()
    return (total / math.fsum(weights)).to(dtype)
