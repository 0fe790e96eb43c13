"""The manifest: what a checkpoint holds and where. `docs/checkpoint.md` is the specification."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config.names import name_fault
from ..parallel.box import Box
from .digest import BLOCK_BYTES, DIGEST_BYTES, HASH_NAME, LEAF_BYTES, text_digest
from .errors import CheckpointError, DamageError
from .identity import UNNAMED, RunIdentity
from .stored_file import StoredFile, digests_bytes, misplaced_segment, segment_end

if TYPE_CHECKING:
    from .planning.tiling import Tiling

FORMAT = "meshloom-checkpoint"
VERSION = 4
HOST_FILES_VERSION = 5  # of a step with files of hosts; others are written as before, for earlier readers
KNOWN = (1, 2, 3, 4, 5)  # up to version 3 the manifest listed every box, and every block's digest: docs/checkpoint.md
MANIFEST = "manifest.json"
_TILINGS_LINE = b'\n"tilings": {'
_ARRAYS_LINE = b'\n"arrays": {'
_DIGEST_LINE = b'"digest": "'
_ARRAY_KEYS = ("name", "role", "dtype", "shape", "splits", "tiling", "turn")

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


def entry_name(key: str, box: Box) -> str:
    """Name of a box in its file's header."""
    return f"{key}@{','.join(map(str, box.offsets))}"


def entry_shape(box: Box, panels: int) -> tuple[int, ...]:
    """Shape of a box's entry in its safetensors file: (panels, …, columns of a panel), or the box's own."""
    return box.shape if panels == 1 else (panels, *box.shape[:-1], box.shape[-1] // panels)


@dataclass(frozen=True)
class GlobalArray:
    """One named global array. `dtype` as in safetensors; `splits`: logical split points along dim 0."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    splits: tuple[int, ...]

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


@dataclass(frozen=True)
class StoredArray(GlobalArray):
    """An array of a checkpoint.

    boxes   where its values are, in other programs' files
    tiling  how it is cut, as an index into the manifest's tilings: the data files' headers say the rest
    turn    where the deal of its parts among the holders of copies begins
    """

    splits: tuple[int, ...] = ()
    boxes: Sequence[StoredBox] = ()
    tiling: int = -1
    turn: int = 0


@dataclass
class Manifest:
    """Everything about a checkpoint except the arrays' bytes.

    run     the run that saved it; None for an import
    commit  number of the commit among those of its folder, which rises with each; 0: from before commits were counted
    suffix  part of the data files' names that is this save's alone, on object stores
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
    version: int = VERSION
    suffix: str = ""
    tilings: list[Tiling] = field(default_factory=list["Tiling"])

    @property
    def bytes(self) -> int:
        """Total size of the data files."""
        return sum(file.bytes for file in self.files)

    def leaf_count(self, file: StoredFile) -> int:
        """Number of leaves of a data file."""
        return -(-file.bytes // self.leaf_bytes)

    def leaves_bytes(self, file: StoredFile) -> int:
        """Length of the digests of a data file."""
        if file.blocks:
            return self.leaf_count(file) * DIGEST_BYTES
        return digests_bytes(file.bytes, self.leaf_bytes, self.block_bytes)

    def segment_end(self, file: StoredFile) -> int:
        """Byte at which a segment ends, with its digests and the zeros behind them."""
        return segment_end(file.start, file.bytes, self.leaf_bytes, self.block_bytes)

    @functools.cached_property
    def lengths(self) -> dict[str, int]:
        """Length of each file that the step consists of, besides the manifest, by name."""
        found: dict[str, int] = {}
        for file in self.files:
            if file.is_segment:
                found[file.name] = max(found.get(file.name, 0), self.segment_end(file))
            else:
                found |= {file.name: file.bytes, file.leaves: self.leaves_bytes(file)}
        return found

    def count_boxes(self, array: StoredArray) -> int:
        """Number of boxes that an array is stored in."""
        return self.tilings[array.tiling].count_parts(array.item_bytes)

    def encode(self, arrays_text: str | None = None) -> bytes:
        """The manifest as text: one line per file and array, and at the end the digest of all lines before it.

        arrays_text: what `encode_arrays` gave for these arrays and tilings, where it is kept from save to save.
        """
        lines = [
            "{",
            f'"format": {json.dumps(FORMAT)},',
            f'"version": {HOST_FILES_VERSION if any(file.is_segment for file in self.files) else VERSION},',
            f'"step": {self.step},',
            f'"world_size": {self.world_size},',
            f'"run": {_compact(None if self.run is None else self.run.as_dict())},',
            f'"commit": {self.commit},',
            f'"hash": {json.dumps(HASH_NAME)},',
            f'"leaf_bytes": {self.leaf_bytes},',
            f'"block_bytes": {self.block_bytes},',
            f'"state": {_compact(self.state, sort_keys=False)},',  # the order of sources and stages has a meaning
            f'"suffix": {json.dumps(self.suffix)},',
            '"files": [',
            ",\n".join(map(_row_of, self.files)),
            "],",
            encode_arrays(self.arrays, self.tilings) if arrays_text is None else arrays_text,
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
        lines = () if arrays else (_TILINGS_LINE, _ARRAYS_LINE)
        start = next((found for found in map(data.find, lines) if found >= 0), -1)
        content = json.loads(data if start < 0 else data[:start] + b'\n"tilings": {}, "arrays": {}}')
        if content.get("format") != FORMAT:
            raise CheckpointError(f"{where}: this is not a {FORMAT}")
        if content["version"] not in KNOWN or content["hash"] != HASH_NAME:
            raise CheckpointError(
                f"{where}: format version {content['version']} with {content['hash']} is not known here; "
                f"this Meshloom reads versions {KNOWN[0]} to {KNOWN[-1]} with {HASH_NAME}"
            )
        files = _files_from_json(content)
        tilings = _tilings_from_json(content, files, where)
        for name in (name for file in files for name in (file.name, file.leaves)):
            if fault := name_fault(name):
                raise DamageError(where, fault)
        return cls(
            step=content["step"],
            world_size=content["world_size"],
            state=content["state"],
            files=files,
            arrays={key: _array_from_json(entry) for key, entry in content["arrays"].items()},
            leaf_bytes=content["leaf_bytes"],
            block_bytes=content["block_bytes"],
            run=_run_of(content, where),
            commit=content.get("commit", 0),
            version=content["version"],
            suffix=content.get("suffix", ""),
            tilings=tilings,
        )


def _row_of(file: StoredFile) -> str:
    row = f'{file.rank},{file.bytes},{file.header},"{file.digest}"'  # by hand: json.dumps takes 25 times as long
    return f"[{row},{file.host},{file.start}]" if file.is_segment else f"[{row}]"


def _files_from_json(content: dict[str, Any]) -> list[StoredFile]:
    if content["version"] < 4:
        return [
            StoredFile(f["name"], f["bytes"], f["leaves"], rank=number, blocks=bytes.fromhex("".join(f["blocks"])))
            for number, f in enumerate(content["files"])
        ]
    if content["version"] < HOST_FILES_VERSION:
        return [StoredFile.of_rank(*row, suffix=content["suffix"]) for row in content["files"]]
    return [StoredFile.segment(*row) for row in content["files"]]


def _tilings_from_json(content: dict[str, Any], files: Sequence[StoredFile], where: str) -> list[Tiling]:
    """The cuts of the arrays. Up to format version 3 each lists its boxes: regions that one file's writer alone holds."""
    if not content["arrays"]:
        return []
    from .planning.tiling import decode_tilings, undealt  # only where it is used: NumPy takes a tenth of a second

    try:
        if content["version"] >= 4:
            return decode_tilings(content["tilings"])
        tilings: list[Tiling] = []
        for entry in content["arrays"].values():
            entry["tiling"] = len(tilings)
            held = sorted((Box(tuple(b["offsets"]), tuple(b["shape"])), b["file"], b["range"][0]) for b in entry["boxes"])
            tilings.append(undealt([box for box, _, _ in held], [number for _, number, _ in held]))
            for _, number, start in held:
                files[number].header = min(start, files[number].header or start)
        return tilings
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DamageError(where, f"how its arrays are cut can't be read: {error}") from error


def prove_manifest(manifest: Manifest, where: str) -> None:
    """Check that the tiling of every array covers it, and that segments follow each other. Raises DamageError."""
    proved: set[tuple[int, tuple[int, ...]]] = set()
    for key, array in manifest.arrays.items():
        if (array.tiling, array.shape) in proved:
            continue
        if not 0 <= array.tiling < len(manifest.tilings):
            raise DamageError(where, f"array {key}: there is no tiling number {array.tiling}")
        tiling = manifest.tilings[array.tiling]
        fault = tiling.fault(array.shape)
        if fault is not None:
            raise DamageError(where, f"array {key}: {fault}")
        proved.add((array.tiling, array.shape))
    stored, whole = sum(f.bytes - f.header for f in manifest.files), sum(array.bytes for array in manifest.arrays.values())
    if stored != whole:
        raise DamageError(where, f"its arrays have {whole} bytes, and its files hold {stored}")
    misplaced = misplaced_segment(manifest.files, manifest.leaf_bytes, manifest.block_bytes)
    if misplaced is not None:
        raise DamageError(where, f"{misplaced.title}, does not begin where the one before it ends")


def encode_arrays(arrays: dict[str, StoredArray], tilings: list[Tiling]) -> str:
    """The lines of the manifest about the arrays, and how they are cut."""
    from .planning.tiling import encode_tilings

    lines = ",\n".join(
        f"{json.dumps(key)}: {_compact({name: getattr(array, name) for name in _ARRAY_KEYS})}"
        for key, array in sorted(arrays.items())
    )
    return f'"tilings": {_compact(encode_tilings(tilings))},\n"arrays": {{\n{lines}\n}},'


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


def _array_from_json(entry: dict[str, Any]) -> StoredArray:
    made: dict[str, Any] = {name: entry[name] for name in _ARRAY_KEYS if name in entry}  # `turn` came with format version 4
    made["shape"], made["splits"] = tuple(entry["shape"]), tuple(entry["splits"])
    return StoredArray(**made)
