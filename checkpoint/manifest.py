"""The manifest: what a checkpoint holds and where. `docs/checkpoint.md` is the specification."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config.names import name_fault
from ..parallel.box import Box
from .coverage import tiling_fault
from .digest import BLOCK_BYTES, HASH_NAME, LEAF_BYTES, text_digest
from .errors import CheckpointError, DamageError
from .identity import UNNAMED, RunIdentity

FORMAT = "meshloom-checkpoint"
VERSION = 3
KNOWN = (1, 2, 3)  # version 1 had no panels, versions 1 and 2 neither run nor commit: docs/checkpoint.md
MANIFEST = "manifest.json"
_ARRAYS_LINE = b'\n"arrays": {'
_DIGEST_LINE = b'"digest": "'

# Names of element types as in safetensors, and their sizes in bytes.
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class StoredBox:
    """One box of an array: bytes `[start, stop)` of `files[file]` hold it, panel after panel, each in row-major order.

    A panel is an equal share of the box's columns (its last dim); with one panel the box is simply row-major.
    """

    box: Box
    file: int
    start: int
    stop: int
    panels: int = 1

    def parts(self) -> Iterator[StoredBox]:
        """The panels, as boxes stored row-major."""
        if self.panels == 1:
            yield self
            return
        width, size = self.box.shape[-1] // self.panels, (self.stop - self.start) // self.panels
        shape = (*self.box.shape[:-1], width)
        for index in range(self.panels):
            box = Box((*self.box.offsets[:-1], self.box.offsets[-1] + index * width), shape)
            yield StoredBox(box, self.file, self.start + index * size, self.start + (index + 1) * size)


def entry_shape(box: Box, panels: int) -> tuple[int, ...]:
    """Shape of a box's entry in its safetensors file: (panels, …, columns of a panel), or the box's own."""
    return box.shape if panels == 1 else (panels, *box.shape[:-1], box.shape[-1] // panels)


@dataclass
class StoredArray:
    """One named global array. `dtype` as in safetensors; `splits`: logical split points along dim 0."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    splits: tuple[int, ...] = ()
    boxes: list[StoredBox] = field(default_factory=list)

    @property
    def key(self) -> str:
        """`<role>/<name>`, unique in a checkpoint."""
        return f"{self.role}/{self.name}"

    @property
    def item_bytes(self) -> int:
        """Size of one element in bytes."""
        return ITEM_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        """Size of the whole array in bytes."""
        return Box.whole(self.shape).numel * self.item_bytes


@dataclass
class StoredFile:
    """One data file: its length, the file with its leaves' digests, and the digests of its blocks.

    leaves  empty for another program's file, which has no digests
    """

    name: str
    bytes: int
    leaves: str
    blocks: list[str]

    @property
    def has_digests(self) -> bool:
        """True if what is read of it can be checked."""
        return bool(self.leaves)


@dataclass
class Manifest:
    """Everything about a checkpoint except the arrays' bytes.

    run     the run that saved it; None for an import
    commit  number of the commit among those of its folder, which rises with each; 0: from before commits were counted
    """

    step: int
    world_size: int
    state: dict[str, Any]
    files: list[StoredFile]
    arrays: dict[str, StoredArray]
    leaf_bytes: int = LEAF_BYTES
    block_bytes: int = BLOCK_BYTES
    run: RunIdentity | None = None
    commit: int = 0

    @property
    def bytes(self) -> int:
        """Total size of the data files."""
        return sum(file.bytes for file in self.files)

    def encode(self, arrays_text: str | None = None) -> bytes:
        """The manifest as text: one line per file and array, and at the end the digest of all lines before it.

        arrays_text: what `encode_arrays` gave for these arrays, where it is kept from save to save.
        """
        lines = [
            "{",
            f'"format": {json.dumps(FORMAT)},',
            f'"version": {VERSION},',
            f'"step": {self.step},',
            f'"world_size": {self.world_size},',
            f'"run": {_compact(None if self.run is None else self.run.as_dict())},',
            f'"commit": {self.commit},',
            f'"hash": {json.dumps(HASH_NAME)},',
            f'"leaf_bytes": {self.leaf_bytes},',
            f'"block_bytes": {self.block_bytes},',
            f'"state": {_compact(self.state, sort_keys=False)},',  # the order of sources and stages has a meaning
            '"files": [',
            ",\n".join(
                _compact({"name": f.name, "bytes": f.bytes, "leaves": f.leaves, "blocks": f.blocks}) for f in self.files
            ),
            "],",
            '"arrays": {',
            encode_arrays(self.arrays) if arrays_text is None else arrays_text,
            "},",
        ]
        body = ("\n".join(lines) + "\n").encode()
        return body + _DIGEST_LINE + text_digest(body).encode() + b'"\n}\n'

    @classmethod
    def decode(cls, data: bytes, where: str, *, arrays: bool = True) -> Manifest:
        """Read a manifest's text. Raises DamageError if it is not as written, CheckpointError if its version is unknown.

        arrays=False: all but the arrays, whose lines, most of the text, are not looked at.
        """
        at = data.rfind(_DIGEST_LINE)
        if at < 0 or not data.endswith(b'"\n}\n'):
            raise DamageError(where, "the manifest is cut off: it does not end with its digest")
        said = data[at + len(_DIGEST_LINE) : -len(b'"\n}\n')].decode(errors="replace")
        if text_digest(data[:at]) != said:
            raise DamageError(where, "the manifest's digest does not match its text")
        start = -1 if arrays else data.find(_ARRAYS_LINE)
        content = json.loads(data if start < 0 else data[: start + len(_ARRAYS_LINE)] + b"}}")
        if content.get("format") != FORMAT:
            raise CheckpointError(f"{where}: this is not a {FORMAT}")
        if content["version"] not in KNOWN or content["hash"] != HASH_NAME:
            raise CheckpointError(
                f"{where}: format version {content['version']} with {content['hash']} is not known here; "
                f"this Meshloom reads versions {KNOWN[0]} to {KNOWN[-1]} with {HASH_NAME}"
            )
        for name in (file[kind] for file in content["files"] for kind in ("name", "leaves")):
            if fault := name_fault(name):
                raise DamageError(where, fault)
        return cls(
            step=content["step"],
            world_size=content["world_size"],
            state=content["state"],
            files=[StoredFile(f["name"], f["bytes"], f["leaves"], f["blocks"]) for f in content["files"]],
            arrays={key: _array_from_json(entry) for key, entry in content["arrays"].items()},
            leaf_bytes=content["leaf_bytes"],
            block_bytes=content["block_bytes"],
            run=_run_of(content, where),
            commit=content.get("commit", 0),
        )


def prove_coverage(arrays: dict[str, StoredArray], file_bytes: Sequence[int], where: str) -> None:
    """Check that the boxes of every array tile it and lie inside their files. Raises DamageError naming the array."""
    for key, array in arrays.items():
        fault = tiling_fault(array.shape, [stored.box for stored in array.boxes])
        if fault is not None:
            raise DamageError(where, f"array {key}: {fault}")
        for stored in array.boxes:
            if not 0 <= stored.file < len(file_bytes):
                raise DamageError(where, f"array {key}: there is no file number {stored.file}")
            size = stored.box.numel * array.item_bytes
            if stored.start < 0 or stored.stop - stored.start != size or stored.stop > file_bytes[stored.file]:
                raise DamageError(where, f"array {key}: bytes {stored.start}–{stored.stop} can't hold {size} bytes")
            if stored.panels != 1 and (stored.panels < 1 or not stored.box.shape or stored.box.shape[-1] % stored.panels):
                raise DamageError(where, f"array {key}: {list(stored.box.shape)} can't be cut into {stored.panels} panels")


def encode_arrays(arrays: dict[str, StoredArray]) -> str:
    """The lines of the manifest about the arrays."""
    return ",\n".join(f"{json.dumps(key)}: {_compact(_array_to_json(array))}" for key, array in sorted(arrays.items()))


def state_fault(state: dict[str, Any]) -> str | None:
    """Return why this state can't be stored as plain JSON, or None."""
    try:
        text = json.dumps(state, allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"the state is not plain JSON ({error}); keep numbers finite and use lists, dicts, strings and numbers only"
    if json.loads(text) != state:
        return "the state changes on its way through JSON (tuples, or keys that are not strings); use lists and string keys"
    return None


def _run_of(content: dict[str, Any], where: str) -> RunIdentity | None:
    """The run that saved a manifest of any version. Before version 3 only its progress told a run's from an import."""
    if content["version"] < 3:
        return UNNAMED if "progress" in content["state"] else None
    try:
        return None if content["run"] is None else RunIdentity.from_dict(content["run"])
    except ValueError as error:
        raise DamageError(where, str(error)) from error


def _compact(value: Any, *, sort_keys: bool = True) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=sort_keys, allow_nan=False)


def _array_to_json(array: StoredArray) -> dict[str, Any]:
    return {
        "name": array.name,
        "role": array.role,
        "dtype": array.dtype,
        "shape": array.shape,
        "splits": array.splits,
        "boxes": [
            {"offsets": s.box.offsets, "shape": s.box.shape, "file": s.file, "range": (s.start, s.stop)}
            | ({"panels": s.panels} if s.panels > 1 else {})
            for s in array.boxes
        ],
    }


def _array_from_json(entry: dict[str, Any]) -> StoredArray:
    return StoredArray(
        name=entry["name"],
        role=entry["role"],
        dtype=entry["dtype"],
        shape=tuple(entry["shape"]),
        splits=tuple(entry["splits"]),
        boxes=[
            StoredBox(Box(tuple(b["offsets"]), tuple(b["shape"])), b["file"], b["range"][0], b["range"][1], b.get("panels", 1))
            for b in entry["boxes"]
        ],
    )
