"""Models to and from the Hugging Face layout: safetensors files, config.json, tokenizer.

What names and keys a family has there, `models/families` knows. Weights keep their values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from ...config.names import name_fault
from ...models.build import build_model
from ...models.config import DecoderConfig, decoder_config
from ...models.families import FAMILIES, Family, StoredWeight, family_of
from ..compare import read_array
from ..compose import Source, compose
from ..dtypes import TORCH_DTYPES, bytes_of
from ..errors import CheckpointError
from ..files import Files
from ..folder import open_step
from ..manifest import ITEM_BYTES, Manifest
from .hf_tokenizer import copy_tokenizer, find_tokenizer, imported_config, special_tokens, write_generation_config
from .tokenizer import TOKENIZER, carry_tokenizer
from .whole import write_whole

SHARD_BYTES = 5 * 10**9
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model*.bin", "*.bin", "*.pth", "*.pt")
HEAD = "lm_head.weight"
_IMPORTED = ("F64", "F32", "BF16", "F16")


def export(
    files: Files,
    folder: Path,
    *,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    family: str | None = None,
) -> Path:
    """Write a step's weights as a folder that `transformers` loads. Host memory holds one array at a time.

    dtype: bf16, fp16 or fp32; None keeps the stored type. tokenizer: a tokenizer.json, or a folder with one, to put in; None:
    the run's own, where it lies beside the checkpoint.
    family: the `model_type` to export as; None: the one it was imported as, or the first that has all parts of the model.
    Raises CheckpointError if the checkpoint is not of a family that is known there, or the folder exists.
    """
    manifest = open_step(files)
    model = _saved_model(files, manifest)
    try:
        chosen = _chosen_family(manifest, model, family)
        described = chosen.to_hugging_face(model)
    except ValueError as error:
        raise CheckpointError(f"{files.label()}: {error}") from error
    weights = chosen.stored_weights(model)
    stored = {key.removeprefix("weight/") for key in manifest.arrays if key.startswith("weight/")}
    if stored - set(weights) - {"head.weight"} or set(weights) - stored:
        odd = sorted(stored ^ set(weights))
        raise CheckpointError(f"{files.label()}: not the weights of such a model: {', '.join(odd[:6])}")
    wanted = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", None: None}.get(dtype, "")
    if wanted == "":
        raise CheckpointError(f"dtype {dtype!r} is not one of bf16, fp16, fp32")
    tensors = _tensors(manifest, weights, wanted)
    vocabulary = _given_tokenizer(tokenizer) if tokenizer is not None else find_tokenizer(files, manifest.state)
    special = special_tokens(manifest.state, vocabulary)

    def write(fresh: Path) -> None:
        _write_shards(files, manifest, fresh, tensors, shard_bytes)
        config = _of_data(manifest, wanted or manifest.arrays["weight/embed.weight"].dtype) | described | special
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_generation_config(fresh, manifest.state, special)
        if vocabulary is not None:
            copy_tokenizer(vocabulary, fresh, special["eos_token_id"])

    return write_whole(folder, write)


def _given_tokenizer(place: Path) -> Path:
    file = place / TOKENIZER if place.is_dir() else place
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no tokenizer.json")
    return file


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the files. weights: ours that it consists of, in the order of its rows."""

    name: str
    weights: list[str]
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def _tensors(manifest: Manifest, weights: Mapping[str, StoredWeight], dtype: str | None) -> list[_Tensor]:
    grouped: dict[str, list[str]] = {}
    for ours in sorted(weights, key=lambda each: weights[each].rows or (0, 0)):
        grouped.setdefault(weights[ours].name, []).append(ours)
    found: list[_Tensor] = []
    for name in dict.fromkeys(place.name for place in weights.values()):
        arrays = [manifest.arrays[f"weight/{ours}"] for ours in grouped[name]]
        shape = (sum(array.shape[0] for array in arrays), *arrays[0].shape[1:])
        found.append(_Tensor(name, grouped[name], dtype or arrays[0].dtype, shape))
    return found


def _write_shards(files: Files, manifest: Manifest, folder: Path, tensors: list[_Tensor], shard_bytes: int) -> None:
    shards: list[list[_Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in shard:
            offsets = (at, at + tensor.bytes)
            header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
            at += tensor.bytes
            index[tensor.name] = name
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        with (folder / name).open("wb") as output:
            output.write(len(text).to_bytes(8, "little") + text)
            for ours, kind in ((ours, TORCH_DTYPES[tensor.dtype]) for tensor in shard for ours in tensor.weights):
                output.write(bytes_of(read_array(files, manifest, f"weight/{ours}").to(kind)))
    if len(shards) > 1:
        total = sum(tensor.bytes for tensor in tensors)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2) + "\n")


def _saved_model(files: Files, manifest: Manifest) -> DecoderConfig:
    """Return the model's config as it was saved with the run."""
    node = manifest.state.get("config", {}).get("model", {})
    embedding = manifest.arrays.get("weight/embed.weight")
    try:
        return decoder_config(node, None if embedding is None else embedding.shape[0])
    except TypeError as error:
        raise CheckpointError(f"{files.label()}: in the saved config {error}; only decoders can be exported") from error


def _chosen_family(manifest: Manifest, model: DecoderConfig, asked: str | None) -> Family:
    """Return the family to export as. Raises ValueError where none, or not the one asked for, has all parts of the model."""
    if asked is not None and asked not in FAMILIES:
        raise ValueError(f"there is no family {asked!r}: {_known()}")
    return family_of(model, asked, manifest.state.get("imported_from", {}).get("config", {}).get("model_type"))


def _known() -> str:
    return ", ".join(FAMILIES)


def _of_data(manifest: Manifest, dtype: str) -> dict[str, Any]:
    """The keys of config.json that follow from the data and the stored types."""
    data = manifest.state.get("config", {}).get("data", {})
    length = data.get("seq_len") if isinstance(data, dict) else None
    if not isinstance(length, int):
        length = imported_config(manifest.state).get("max_position_embeddings", 8192)
    return {
        "max_position_embeddings": length,
        "torch_dtype": {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}[dtype],
    }


def import_hf(source: Path, folder: str | Path, tokenizer: Path | None = None) -> Path:
    """Make a checkpoint (step 0, weights only) out of a Hugging Face folder. Host memory holds one array at a time.

    Its state carries the model's recipe as `config.model`. Names and shapes of all weights are compared before any is read.
    Raises CheckpointError for an architecture or a key of config.json that the decoder does not have, and for weights that
    are missing, left over or of another shape.
    """
    theirs, family, model = _from_hf_config(source)
    with ExitStack() as stack:
        opened = _open_shards(source, stack)
        stems = {name: family.stem(name) for name in opened}
        readers = {stem: _Lazy(opened[name], name) for name, stem in stems.items() if stem is not None}
        left_out = sorted(name for name, stem in stems.items() if stem is None)
        sources = _compared(source, model, family, readers)
        imported = {"format": "hugging_face", "config": theirs, "left_out": left_out}
        settings = source / "generation_config.json"
        if settings.is_file():
            imported["generation_config"] = json.loads(settings.read_text())
        carried = carry_tokenizer(source, tokenizer)
        state = {"config": {"model": model}, "imported_from": imported}
        return compose(folder, 0, sources, state | carried.state, carried.files)


class _Lazy:
    """A tensor of an open file, whose shape and type are known before its values are read."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        self._slice = file.get_slice(name)
        self.shape, self.dtype = tuple(self._slice.get_shape()), str(self._slice.get_dtype())

    def read(self, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return the values, or those of some rows."""
        return self._file.get_tensor(self._name) if rows is None else self._slice[rows[0] : rows[1]]


def _compared(source: Path, model: dict[str, Any], family: Family, readers: dict[str, _Lazy]) -> list[Source]:
    """Return the weights to read. Raises CheckpointError for all that don't belong to the model, by name."""
    weights = family.stored_weights(decoder_config(model))
    shapes = {name: tuple(weight.shape) for name, weight in build_model(model, model["vocabulary"]).named_parameters()}
    assert weights.keys() == shapes.keys(), "a family names the decoder's weights"
    faults: list[str] = []
    expected: dict[str, int] = {}
    for ours, place in weights.items():
        expected[place.name] = max(expected.get(place.name, 0), place.rows[1] if place.rows else shapes[ours][0])
    for ours, place in weights.items():
        wanted, found = (expected[place.name], *shapes[ours][1:]), readers.get(place.name)
        if found is None:
            faults.append(f"{place.name} is missing")
        elif found.shape != wanted:
            faults.append(f"{place.name} has the shape {list(found.shape)}, but config.json describes {list(wanted)}")
        elif found.dtype not in _IMPORTED:
            faults.append(f"{place.name} is stored as {found.dtype}; convert it to one of {', '.join(_IMPORTED)}")
    head = readers.pop(HEAD, None) if HEAD not in expected else None
    left = (name for name in readers if name not in expected and not name.endswith("rotary_emb.inv_freq"))
    faults += [f"{name} is no weight of such a model" for name in sorted(left)]
    faults = list(dict.fromkeys(faults))
    if not faults and head is not None and not torch.equal(head.read(), readers[weights["embed.weight"].name].read()):
        faults.append(f"tie_word_embeddings is true, but {HEAD} is not the embedding")
    if faults:
        more = f"; and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise CheckpointError(f"{source}: {'; '.join(faults[:6])}{more}")
    return [_source(ours, place, readers[place.name], shapes[ours]) for ours, place in weights.items()]


def _source(ours: str, place: StoredWeight, tensor: _Lazy, shape: tuple[int, ...]) -> Source:
    return Source(ours, "weight", TORCH_DTYPES[tensor.dtype], shape, lambda: tensor.read(place.rows))


def _open_shards(source: Path, stack: ExitStack) -> dict[str, Any]:
    """Weight name → the open safetensors file that holds it."""
    readers: dict[str, Any] = {}
    for path in _shard_paths(source):
        if not path.is_file():
            raise CheckpointError(f"{path}: the file is missing")
        reader = stack.enter_context(safetensors.safe_open(path, "pt"))
        readers |= dict.fromkeys(reader.keys(), reader)
    return readers


def _shard_paths(source: Path) -> Iterator[Path]:
    """Yield the files that transformers reads: one file counts before an index of several."""
    if (source / SINGLE).is_file():
        yield source / SINGLE
    elif (source / INDEX).is_file():
        weight_map: dict[str, str] = json.loads((source / INDEX).read_text())["weight_map"]
        for name in sorted(set(weight_map.values())):
            if fault := name_fault(name, nested=True):
                raise CheckpointError(f"{source / INDEX}: {fault}")
            yield source / name
    else:
        pickled = next((name for name in PICKLED if list(source.glob(name))), None)
        if pickled is None:
            raise CheckpointError(f"{source}: there is neither {SINGLE} nor {INDEX}, so no weights")
        fix = "convert them with transformers: save_pretrained(…, safe_serialization=True)"
        raise CheckpointError(f"{source}: the weights are in {pickled}, and only safetensors can be read; {fix}")


def _from_hf_config(source: Path) -> tuple[dict[str, Any], Family, dict[str, Any]]:
    path = source / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: not a Hugging Face model folder")
    theirs: dict[str, Any] = json.loads(path.read_text())
    family = FAMILIES.get(theirs.get("model_type", ""))
    if family is None:
        raise CheckpointError(f"{path}: model_type {theirs.get('model_type')!r}; only {_known()} can be imported")
    try:
        return theirs, family, family.from_hugging_face(theirs)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
