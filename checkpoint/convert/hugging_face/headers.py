"""The tensors in a folder of safetensors files, and their bytes there, as the files' headers say. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....config.names import name_fault
from ....parallel.box import Box
from ...errors import CheckpointError
from ...manifest import ITEM_BYTES, StoredArray, StoredBox
from ...stored_file import StoredFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model*.bin", "*.bin", "*.pth", "*.pt")
HEADER_BYTES = 100_000_000
"""The longest header that safetensors itself reads."""


@dataclass(frozen=True)
class Shards:
    """The safetensors files of a folder, and the tensors in them, by name; each is one box of one file."""

    files: list[StoredFile]
    tensors: dict[str, StoredArray]


def read_headers(folder: Path) -> Shards:
    """Read the headers of the files that transformers reads.

    Raises CheckpointError for a folder without such files, and for a file that is missing, cut off or not as its header or
    the index says; it names all such files.
    """
    files: list[StoredFile] = []
    tensors: dict[str, StoredArray] = {}
    faults: list[str] = []
    weight_map = _weight_map(folder)
    for name in [SINGLE] if weight_map is None else sorted(set(weight_map.values())):
        try:
            size, found = _read_header(folder / name, len(files))
        except CheckpointError as error:
            faults.append(str(error))
            continue
        files.append(StoredFile(name, size, ""))
        for twice in sorted(tensors.keys() & found):
            faults.append(f"{folder / name}: {twice} is in {files[_file(tensors[twice])].name}, too")
        tensors |= found
    if not faults and weight_map is not None:
        faults += _index_faults(folder, weight_map, files, tensors)
    if faults:
        raise CheckpointError(some(faults))
    return Shards(files, tensors)


def some(faults: list[str]) -> str:
    """Return the first few faults as one message."""
    more = f"; and {len(faults) - 6} more" if len(faults) > 6 else ""
    return "; ".join(faults[:6]) + more


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises CheckpointError, naming the file."""
    try:
        found: Any = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Return tensor → file as the index says; None where one file holds all, which counts before an index."""
    if (folder / SINGLE).is_file():
        return None
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX} has no weight_map of tensors to files")
        for name in weight_map.values():
            if fault := name_fault(name, nested=True):
                raise CheckpointError(f"{folder / INDEX}: {fault}")
        return weight_map
    pickled = next((name for name in PICKLED if list(folder.glob(name))), None)
    if pickled is None:
        raise CheckpointError(f"{folder}: there is neither {SINGLE} nor {INDEX}, so no weights")
    fix = "convert them with transformers: save_pretrained(…, safe_serialization=True)"
    raise CheckpointError(f"{folder}: the weights are in {pickled}, and only safetensors can be read; {fix}")


def _read_header(path: Path, number: int) -> tuple[int, dict[str, StoredArray]]:
    """Return a file's size, and its tensors. number: of the file among the folder's."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or 8 + length > size or length > HEADER_BYTES:
                raise CheckpointError(f"{path}: it is cut off, or no safetensors file: its header would not fit")
            header: Any = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: it can't be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not JSON: {error}") from error
    try:
        found = {name: _tensor(name, entry, number, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: its header is not that of a safetensors file ({reason})") from error
    end = max((tensor.boxes[0].stop for tensor in found.values()), default=0)
    if end > size:
        raise CheckpointError(f"{path}: it is cut off: its header describes {end:,} bytes, and it has {size:,}")
    return size, found


def _tensor(name: str, entry: Any, number: int, base: int) -> StoredArray:
    dtype, shape = str(entry["dtype"]), tuple(int(extent) for extent in entry["shape"])
    start, stop = (base + int(offset) for offset in entry["data_offsets"])
    if not base <= start <= stop or min(shape, default=0) < 0:
        raise ValueError(f"{name} has impossible offsets or sizes")
    if dtype in ITEM_BYTES and stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{name} of shape {list(shape)} and type {dtype} does not have {stop - start} bytes")
    return StoredArray(name, "tensor", dtype, shape, boxes=[StoredBox(Box.whole(shape), number, start, stop)])


def _file(tensor: StoredArray) -> int:
    return tensor.boxes[0].file


def _index_faults(
    folder: Path, weight_map: dict[str, str], files: list[StoredFile], tensors: dict[str, StoredArray]
) -> Iterator[str]:
    for name, file in sorted(weight_map.items()):
        if name not in tensors or files[_file(tensors[name])].name != file:
            yield f"{folder / INDEX}: {name} should be in {file}, and is not"
