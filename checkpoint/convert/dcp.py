"""Import from a PyTorch Distributed Checkpoint folder, through PyTorch's own reader."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException

from ..compose import Source, compose
from ..errors import CheckpointError

log = logging.getLogger(__name__)

# What get_state_dict and the trainers built on it call their parts.
_OPTIMIZER = re.compile(r"(?:optim|optimizer|optimizers)\.state\.(?P<name>.+)\.(?P<role>[^.]+)")
_MODEL = re.compile(r"(?:model|module|app\.model)\.(?P<name>.+)")


def import_dcp(source: Path, folder: str | Path) -> Path:
    """Make a checkpoint out of a DCP folder. Host memory holds one array at a time.

    Weights become role "weight", optimizer tensors a role by their name (exp_avg, …), names stay as they are. Tensors of
    one element such as Adam's `step` go into the state, under `imported_from.scalars`. Pickled objects are left out and
    named in `imported_from.left_out`. DCP's own index is a pickle: import folders from people you trust only.
    """
    reader = torch_dcp.FileSystemReader(source)
    try:
        metadata: Any = reader.read_metadata()
    except Exception as error:
        raise CheckpointError(f"{source}: the index of this DCP folder can't be read: {error}") from error
    entries: dict[str, Any] = dict(metadata.state_dict_metadata)
    named_model = any(_MODEL.fullmatch(key) for key in entries)
    sources: list[Source] = []
    scalars: dict[str, float] = {}
    left_out: list[str] = []
    for key, entry in entries.items():
        if not hasattr(entry, "properties"):
            left_out.append(key)
            continue
        shape, dtype = tuple(entry.size), entry.properties.dtype
        read = _getter(source, key, shape, dtype)
        optimizer, model = _OPTIMIZER.fullmatch(key), _MODEL.fullmatch(key)
        if optimizer and not shape:
            scalars[f"{optimizer['role']}/{optimizer['name']}"] = float(read())
        elif optimizer:
            plain = _MODEL.fullmatch(optimizer["name"])
            sources.append(Source(plain["name"] if plain else optimizer["name"], optimizer["role"], dtype, shape, read))
        elif model or not named_model:
            sources.append(Source(model["name"] if model else key, "weight", dtype, shape, read))
        else:
            sources.append(Source(key, "other", dtype, shape, read))
    if left_out:
        log.warning("%s: %d pickled objects are left out: %s", source, len(left_out), ", ".join(left_out[:8]))
    step = re.search(r"(\d+)$", source.name)
    state = {"imported_from": {"format": "dcp", "scalars": scalars, "left_out": left_out}}
    return compose(folder, int(step[1]) if step else 0, sources, state)


def _getter(source: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        target = {key: torch.empty(shape, dtype=dtype)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that no process group is there; none is needed
            try:
                torch_dcp.load(target, storage_reader=torch_dcp.FileSystemReader(source), no_dist=True)
            except CheckpointException as error:  # no Exception; in it are those of the ranks, here of one
                reason, _ = next(iter(error.failures.values()))
                raise CheckpointError(f"{source}: {key} can't be read: {type(reason).__name__}: {reason}") from error
        return target[key]

    return read
