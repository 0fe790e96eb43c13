"""Write a step's weights as a Hugging Face folder, which `transformers` loads.

What names and keys a family has there, `models/families` knows. Weights keep their values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....models.config import DecoderConfig, decoder_config
from ....models.families import FAMILIES, Family, family_of
from ....parallel.box import Box
from ...dtypes import TORCH_DTYPES, as_tensor, bytes_of
from ...errors import CheckpointError
from ...files import Files
from ...folder import open_step
from ...manifest import ITEM_BYTES, Manifest, StoredArray
from ...reading.compare import parts
from ...reading.reader import Reader
from ..companions import TOKENIZER
from ..progress import tell
from ..whole import write_whole
from .folder import known_families
from .headers import INDEX, SINGLE
from .layout import PlacedPart, place_parts, tensor_shapes
from .tokenizer import copy_tokenizer, find_tokenizer, imported_config, special_tokens, write_generation_config

SHARD_BYTES = 5 * 10**9


def export(
    files: Files,
    folder: Path,
    *,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    family: str | None = None,
) -> Path:
    """Write a step's weights as a folder that `transformers` loads. Host memory holds a part of a tensor at a time.

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
    shapes = {ours: manifest.arrays[f"weight/{ours}"].shape for ours in weights}
    tensors = _tensors(manifest, place_parts(weights, shapes), wanted)
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
    """A tensor of the files. placed: the parts of our weights that it consists of, in the order in which they lie there"""

    name: str
    placed: list[PlacedPart]
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def _tensors(manifest: Manifest, placed: Sequence[PlacedPart], dtype: str | None) -> list[_Tensor]:
    grouped: dict[str, list[PlacedPart]] = {}
    for each in placed:
        grouped.setdefault(each.part.name, []).append(each)
    shapes = tensor_shapes(placed)
    for name, each in grouped.items():
        assert sum(one.box.numel for one in each) == math.prod(shapes[name]), f"parts of the decoder make up {name}"
    return [
        _Tensor(
            name,
            sorted(each, key=lambda one: (one.part.index, one.part.rows or (0, 0))),
            dtype or manifest.arrays[f"weight/{each[0].ours}"].dtype,
            shapes[name],
        )
        for name, each in grouped.items()
    ]


def _values(reader: Reader, tensor: _Tensor) -> Iterator[torch.Tensor]:
    """Yield the values of a tensor, part by part; whole where our rows don't lie there one after the other."""
    kind = TORCH_DTYPES[tensor.dtype]
    plain = all(each.part.is_plain for each in tensor.placed)
    whole = None if plain else torch.empty(tensor.shape, dtype=kind)
    for each in tensor.placed:
        array = reader.manifest.arrays[f"weight/{each.ours}"]
        part = StoredArray(each.ours, "weight", array.dtype, each.box.shape)
        for box in parts(part):
            inside = Box(tuple(a + b for a, b in zip(box.offsets, each.box.offsets, strict=True)), box.shape)
            values = as_tensor(reader.read([(array, inside)])[0], array.dtype)
            if whole is None:
                yield values.to(kind)
            else:
                each.view(whole)[box.slices()].copy_(values)
    if whole is not None:
        yield whole


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
    reader, total, done = Reader(files, manifest), sum(tensor.bytes for tensor in tensors), 0
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
            for values in (values for tensor in shard for values in _values(reader, tensor)):
                done += output.write(bytes_of(values))
                tell(done, total)
    if len(shards) > 1:
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
        raise ValueError(f"there is no family {asked!r}: {known_families()}")
    return family_of(model, asked, (manifest.state.get("imported_from") or {}).get("config", {}).get("model_type"))


def _of_data(manifest: Manifest, dtype: str) -> dict[str, Any]:
    """The keys of config.json that follow from the data and the stored types."""
    data = manifest.state.get("config", {}).get("data", {})
    trained = data.get("seq_len") if isinstance(data, dict) else None
    stated = imported_config(manifest.state).get("max_position_embeddings")
    lengths = [length for length in (trained, stated) if isinstance(length, int)]
    return {
        "max_position_embeddings": max(lengths, default=8192),
        "torch_dtype": {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}[dtype],
    }
