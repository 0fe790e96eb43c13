"""A Hugging Face folder seen as a checkpoint: our weights by name, each made of parts of tensors in its files.

Opening it reads config.json and the files' headers. Names and shapes of all weights are compared before any value is read.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....models.build import build_model
from ....models.config import decoder_config
from ....models.families import FAMILIES, Family
from ...errors import CheckpointError
from ...files import LocalFiles
from ...manifest import Manifest, StoredArray
from ...stored_file import StoredFile
from ..tokenizer import carry_tokenizer
from .encodings import Tensor, decodable
from .headers import read_headers, read_json, some
from .layout import PlacedPart, place_parts, tensor_shapes

log = logging.getLogger(__name__)

HEAD = "lm_head.weight"
_READ = ("F64", "F32", "BF16", "F16")


class LinkedFiles(LocalFiles):
    """A folder whose files may be links, as those in Hugging Face's cache are. Their names are checked before."""

    def _refuse_outside(self, name: str) -> None:
        pass


@dataclass(frozen=True)
class HuggingFaceFolder:
    """An opened folder.

    manifest  our weights, without boxes, and the state of a checkpoint that has no progress
    tensors   name in the files of a text model → tensor
    placed    our name → its parts
    stored    the files and the tensors in them
    head      a stored head that must be the embedding, with it; None: there is none
    beside    name → contents of files that belong to the checkpoint
    """

    path: Path
    manifest: Manifest
    tensors: Mapping[str, Tensor]
    placed: Mapping[str, list[PlacedPart]]
    stored: Manifest
    head: tuple[Tensor, Tensor] | None
    beside: Mapping[str, bytes] = field(default_factory=dict[str, bytes])

    @property
    def files(self) -> LinkedFiles:
        """The folder as a set of files."""
        return LinkedFiles(self.path)

    def warn_of_left_out(self) -> None:
        """Warn of the tensors that are no part of the text model, such as a vision tower's."""
        left_out = self.manifest.state["imported_from"]["left_out"]
        if left_out:
            log.warning("%s: %d tensors are left behind: %s", self.path, len(left_out), some(left_out))


def open_folder(path: Path, tokenizer: Path | None = None) -> HuggingFaceFolder:
    """Open a folder of a family that the decoder has.

    tokenizer: a tokenizer.json, or a folder with one; None: the folder's own

    Raises CheckpointError for an architecture or a key of config.json that the decoder does not have, for weights that are
    missing, left over or of another shape, and for damaged files.
    """
    theirs, family, model = _read_config(path)
    shards = read_headers(path)
    stems = {name: family.stem(name, theirs) for name in shards.tensors}
    tensors = decodable({stem: shards.tensors[name] for name, stem in stems.items() if stem is not None}, theirs)
    if model["layers"] > len(tensors):  # else it would take long to build, only to be refused
        raise CheckpointError(f"{path}: config.json describes {model['layers']} layers, and there are {len(tensors)} tensors")
    placed: dict[str, list[PlacedPart]] = {}
    try:
        shapes = weight_shapes(model)
    except (ArithmeticError, MemoryError, RuntimeError, TypeError) as error:  # as PyTorch raises for a size beyond 64 bits
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: config.json describes weights of impossible sizes ({reason})") from error
    for part in place_parts(family.stored_weights(decoder_config(model)), shapes):
        placed.setdefault(part.ours, []).append(part)
    head = _compare(path, placed, tensors)
    arrays: dict[str, StoredArray] = {}
    for ours, parts in placed.items():
        rows = sum(part.box.shape[0] for part in parts)
        array = StoredArray(ours, "weight", tensors[parts[0].part.name].dtype, (rows, *parts[0].box.shape[1:]))
        arrays[array.key] = array
    imported = {"format": "hugging_face", "config": theirs, "left_out": sorted(n for n, stem in stems.items() if stem is None)}
    if (path / "generation_config.json").is_file():
        imported["generation_config"] = read_json(path / "generation_config.json")
    carried = carry_tokenizer(path, tokenizer)
    state = {"config": {"model": model}, "imported_from": imported, **carried.state}
    return HuggingFaceFolder(
        path,
        _manifest(shards.files, arrays, state),
        tensors,
        placed,
        _manifest(shards.files, shards.tensors, {}),
        None if head is None else (tensors[head], tensors[placed["embed.weight"][0].part.name]),
        carried.files,
    )


def weight_shapes(model: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """Return name → shape of all that is saved as weights of a model. model: keys, the vocabulary included"""
    return _weight_shapes(json.dumps(model))


@functools.lru_cache(maxsize=2)  # a run opens its folder three times, and building 80 layers takes seconds
def _weight_shapes(model: str) -> Mapping[str, tuple[int, ...]]:
    node = json.loads(model)
    built = build_model(node, node["vocabulary"])
    return {name: tuple(each.shape) for name, each in (*built.named_parameters(), *built.saved_buffers().items())}


def known_families() -> str:
    """Return the names of all families, as a list to read."""
    return ", ".join(FAMILIES)


def _manifest(files: list[StoredFile], arrays: dict[str, StoredArray], state: dict[str, Any]) -> Manifest:
    return Manifest(0, 1, state, files, arrays)


def _read_config(folder: Path) -> tuple[dict[str, Any], Family, dict[str, Any]]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: not a Hugging Face model folder")
    theirs = read_json(path)
    family = FAMILIES.get(str(theirs.get("model_type")))
    if family is None:
        raise CheckpointError(f"{path}: model_type {theirs.get('model_type')!r}; only {known_families()} can be imported")
    try:
        return theirs, family, family.from_hugging_face(theirs)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # whatever a value makes of an unforeseen kind
        raise CheckpointError(f"{path} can't be understood ({type(error).__name__}: {error})") from error


def _compare(path: Path, placed: Mapping[str, list[PlacedPart]], tensors: Mapping[str, Tensor]) -> str | None:
    """Raise CheckpointError for all tensors that don't belong to the model, by name. Return a head that is stored, but tied."""
    expected = tensor_shapes(part for parts in placed.values() for part in parts)
    faults: list[str] = []
    for name, wanted in expected.items():
        found = tensors.get(name)
        if found is None:
            faults.append(f"{name} is missing")
        elif found.shape != wanted:
            faults.append(f"{name} has the shape {list(found.shape)}, but config.json describes {list(wanted)}")
        elif found.dtype not in _READ:
            faults.append(f"{name} is stored as {found.dtype}; convert it to one of {', '.join(_READ)}")
    for ours, parts in placed.items():
        kinds = {tensors[part.part.name].dtype for part in parts if part.part.name in tensors}
        if len(kinds) > 1:
            faults.append(f"the tensors of {ours} are stored as {' and '.join(sorted(kinds))}; convert them to one type")
    head = HEAD if HEAD in tensors and HEAD not in expected else None
    left = (name for name in tensors if name not in expected and name != head and not name.endswith("rotary_emb.inv_freq"))
    faults += [f"{name} is no weight of such a model" for name in sorted(left)]
    embedding = placed["embed.weight"][0].part.name
    if head is not None and not faults and tensors[head].shape != tensors[embedding].shape:
        faults.append(f"tie_word_embeddings is true, but {HEAD} is not of the embedding's shape")
    if faults:
        raise CheckpointError(f"{path}: {some(faults)}")
    return head
