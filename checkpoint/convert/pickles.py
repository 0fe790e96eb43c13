"""Files that `torch.save` wrote, read without running any code that is in them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError


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
    """Load a file that `torch.save` wrote. Its tensors are mapped from the disk, not read, and no code in it is run."""
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing")
    try:
        return torch.load(path, map_location="cpu", mmap=True, pickle_module=SafePickle, weights_only=False)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
