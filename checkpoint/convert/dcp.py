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
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from ...config.names import name_fault
from ..errors import CheckpointError
from .compose import Source, compose
from .pickles import load_index
from .tokenizer import carry_tokenizer

log = logging.getLogger(__name__)

# What get_state_dict and the trainers built on it call their parts.
_OPTIMIZER = re.compile(r"(?:optim|optimizer|optimizers)\.state\.(?P<name>.+)\.(?P<role>[^.]+)")
_HUGGING_FACE = re.compile(r"lm_head\.|model\.(?:embed_tokens|norm)\.|model\.layers\.\d+\.(?:self_attn|mlp)\.")
_MODEL = re.compile(r"(?:model|module|app\.model)\.(?P<name>.+)")


class _IndexedReader(torch_dcp.FileSystemReader):
    """PyTorch's reader over an index that is read once, without running code, and names files of the folder only."""

    def __init__(self, source: Path) -> None:
        super().__init__(source)
        self._index = load_index(source / ".metadata")
        for stored in (self._index.storage_data or {}).values():
            fault = name_fault(getattr(stored, "relative_path", None), nested=True)
            if fault is not None:
                raise CheckpointError(f"{source}/.metadata: {fault}")
        self._index.storage_meta = self._index.storage_meta or StorageMeta()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index."""
        return self._index


def import_dcp(source: Path, folder: str | Path, tokenizer: Path | None = None, *, overwrite: bool = False) -> Path:
    """Make a checkpoint out of a DCP folder. Host memory holds one array at a time.

    Weights become role "weight", optimizer tensors a role by their name (exp_avg, …), names stay as they are. Tensors of
    one element such as Adam's `step` go into the state, under `imported_from.scalars`. Pickled objects are left out and
    named in `imported_from.left_out`. No code in the files is run.
    """
    reader = _IndexedReader(source)
    metadata: Any = reader.read_metadata()
    entries: dict[str, Any] = dict(metadata.state_dict_metadata)
    # Hugging Face's own names begin with "model." too: then nothing stands before the names, and all are weights.
    named_model = any(_MODEL.fullmatch(key) for key in entries) and not any(_HUGGING_FACE.match(key) for key in entries)
    sources: list[Source] = []
    scalars: dict[str, float] = {}
    left_out: list[str] = []
    for key, entry in entries.items():
        if not hasattr(entry, "properties"):
            left_out.append(key)
            continue
        shape, dtype = tuple(entry.size), entry.properties.dtype
        read = _getter(reader, source, key, shape, dtype)
        optimizer, model = _OPTIMIZER.fullmatch(key), _MODEL.fullmatch(key) if named_model else None
        if optimizer and not shape:
            scalars[f"{optimizer['role']}/{optimizer['name']}"] = float(read())
        elif optimizer:
            plain = _MODEL.fullmatch(optimizer["name"]) if named_model else None
            sources.append(Source(plain["name"] if plain else optimizer["name"], optimizer["role"], dtype, shape, read))
        elif model or not named_model:
            sources.append(Source(model["name"] if model else key, "weight", dtype, shape, read))
        else:
            sources.append(Source(key, "other", dtype, shape, read))
    if others := [source.name for source in sources if source.role == "other"]:
        log.warning("%s: %d arrays are neither weights nor of an optimizer: %s", source, len(others), ", ".join(others[:8]))
    if left_out:
        log.warning("%s: %d pickled objects are left out: %s", source, len(left_out), ", ".join(left_out[:8]))
    step = re.search(r"(\d+)$", source.name)
    state = {"imported_from": {"format": "dcp", "scalars": scalars, "left_out": left_out}}
    carried = carry_tokenizer(source, tokenizer)
    return compose(folder, int(step[1]) if step else 0, sources, state | carried.state, carried.files, overwrite=overwrite)


def _getter(
    reader: _IndexedReader, source: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        target = {key: torch.empty(shape, dtype=dtype)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that no process group is there; none is needed
            try:
                torch_dcp.load(target, storage_reader=reader, no_dist=True)
            except CheckpointException as error:  # no Exception; in it are those of the ranks, here of one
                reason, _ = next(iter(error.failures.values()))
                raise CheckpointError(f"{source}: {key} can't be read: {type(reason).__name__}: {reason}") from error
        return target[key]

    return read
