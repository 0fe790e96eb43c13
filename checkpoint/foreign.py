"""Bring in checkpoints that other programs wrote. Which program it was is told by the files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError


def bring_in(source: Path, folder: str | Path, kind: str | None = None) -> Path:
    """Make a checkpoint out of a folder of kind hf, deepspeed or dcp (None: find out). Returns the step's folder."""
    if not source.is_dir():
        raise CheckpointError(f"{source} is not a folder")
    kind = kind or kind_of(source)
    if kind == "hf":
        from .hf import import_hf

        return import_hf(source, folder)
    if kind == "deepspeed":
        from .deepspeed import import_deepspeed

        return import_deepspeed(source, folder)
    from .dcp import import_dcp

    return import_dcp(source, folder)


def kind_of(source: Path) -> str:
    """hf, deepspeed or dcp. Raises CheckpointError if it is none of them."""
    if (source / "config.json").is_file():
        return "hf"
    if (source / ".metadata").is_file():
        return "dcp"
    marks = ("latest", "latest_universal", "zero")
    if any((source / mark).exists() for mark in marks) or list(source.glob("*_optim_states.pt")):
        return "deepspeed"
    raise CheckpointError(f"{source}: no config.json (hf), .metadata (dcp), latest or *_optim_states.pt (deepspeed) in it")


class _Stranger:
    """Stands for an object of a class that is not needed here; nothing of it is run."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> _Stranger:
        return self

    def __setstate__(self, state: object) -> None:
        pass

    def __reduce__(self) -> Any:
        return _Stranger, ()


_HARMLESS = {
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "set"),
    ("builtins", "dict"),
    ("builtins", "list"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        """Tensors and containers as they are; anything else becomes a Stranger, so that no foreign code runs."""
        tensor_part = module_name == "torch._utils" and global_name.startswith("_rebuild_")
        storage = module_name == "torch" and global_name.endswith("Storage")
        element_type = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if tensor_part or storage or element_type or (module_name, global_name) in _HARMLESS:
            return super().find_class(module_name, global_name)
        return _Stranger


class SafePickle:
    """A pickle module for `torch.load` that builds tensors and containers only."""

    Unpickler = _Unpickler
    UnpicklingError = pickle.UnpicklingError
    load = staticmethod(pickle.load)
    __name__ = "pickle"


def load_mapped(path: Path) -> Any:
    """What `torch.save` wrote to a file, its tensors mapped from the disk, not read; no code in it is run."""
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing")
    try:
        return torch.load(path, map_location="cpu", mmap=True, pickle_module=SafePickle, weights_only=False)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
