"""Read pickled files of other programs without running any code that is in them.

Nothing that a file names is imported. What `torch.save` wrote goes through `torch.load` with `weights_only`; objects of classes
that PyTorch does not list as safe become inert stand-ins. The index of a DCP folder is built from the classes listed here.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import (
    _StorageInfo,  # pyright: ignore[reportPrivateUsage] (what DCP's index consists of)
    _StoragePrefix,  # pyright: ignore[reportPrivateUsage]
)
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,  # pyright: ignore[reportPrivateUsage]
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ..errors import CheckpointError


class _StandIn:
    """An inert object in the place of one whose class is not needed."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __new__(cls, *_: object, **__: object) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def _plain_dict(*_: object) -> dict[Any, Any]:
    """Stand for `collections.defaultdict`, whose items follow."""
    return {}


def load_mapped(path: Path) -> Any:
    """Read what `torch.save` wrote, its tensors mapped from the disk. Objects of unknown classes are stand-ins.

    Raises CheckpointError for a file that is missing or damaged, a TorchScript archive, or one that names what PyTorch blocks.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing")
    try:
        # It refuses TorchScript archives, which `torch.load` would hand to `torch.jit.load`, and what is no archive.
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        known: list[Any] = [(_StandIn, name) for name in foreign if name != "collections.defaultdict"]
        with torch.serialization.safe_globals([*known, (_plain_dict, "collections.defaultdict")]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.sub(r".*?WeightsUnpickler error:\s*", "", str(error), flags=re.DOTALL).partition("\n")[0]
        message = f"{path} holds more than tensors and plain values, and no code of a file is ever run: {reason}"
        raise CheckpointError(message) from error
    except (RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} can't be read as a file of tensors: {error}") from error


def _memory_format(number: int) -> Any:
    return _MEM_FORMAT_ENCODING(number)


_INDEX_CLASSES: dict[tuple[str, str], Any] = {
    **{
        ("torch.distributed.checkpoint.metadata", kind.__name__): kind
        for kind in (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            StorageMeta,
            TensorProperties,
            TensorStorageMetadata,
        )
    },
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): _memory_format,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): _StoragePrefix,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # pyright: ignore[reportPrivateUsage]
    ("collections", "OrderedDict"): dict,
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return a class of the list, or an element type. Raises UnpicklingError for any other."""
        if (module_name, global_name) in _INDEX_CLASSES:
            return _INDEX_CLASSES[module_name, global_name]
        element_type = getattr(torch, global_name, None) if module_name == "torch" else None
        if isinstance(element_type, torch.dtype):
            return element_type
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no index of tensors needs")


def load_index(path: Path) -> Metadata:
    """Read the index (`.metadata`) of a DCP folder. Raises CheckpointError if it is damaged, or names any other class."""
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path.parent}: the index of this DCP folder can't be read: {error}") from error
    if not isinstance(index, Metadata):
        raise CheckpointError(f"{path.parent}: the index of this DCP folder holds a {type(index).__name__}, no index")
    return index
