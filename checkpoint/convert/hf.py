"""Models to and from the Hugging Face layout: safetensors files, config.json, tokenizer.

What names and keys a family has there, `models/families` knows. Weights keep their values.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors
import torch

from ...models.config import DecoderConfig, decoder_config
from ...models.families import FAMILIES, Family
from ..compare import read_array
from ..compose import Source, compose
from ..dtypes import TORCH_DTYPES, bytes_of
from ..errors import CheckpointError
from ..files import Files
from ..folder import open_step
from ..manifest import ITEM_BYTES, Manifest
from .tokenizer import carry_tokenizer
from .whole import write_whole

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


def export(
    files: Files, folder: Path, *, dtype: str | None = None, tokenizer: Path | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write a step's weights as a folder that `transformers` loads. Host memory holds one array at a time.

    dtype: bf16, fp16 or fp32; None keeps the stored type. tokenizer: a tokenizer.json, or a folder with one, to put in.
    Raises CheckpointError if the checkpoint is not of a family that is known there, or the folder exists.
    """
    manifest = open_step(files)
    family, model = _family_and_config(files, manifest)
    try:
        described = family.to_hugging_face(model)
    except ValueError as error:
        raise CheckpointError(f"{files.label()}: {error}") from error
    names = family.names(model)
    stored = {key.removeprefix("weight/") for key in manifest.arrays if key.startswith("weight/")}
    if stored - set(names) - {"head.weight"} or set(names) - stored:
        odd = sorted(stored ^ set(names))
        raise CheckpointError(f"{files.label()}: not the weights of such a model: {', '.join(odd[:6])}")
    wanted = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", None: None}.get(dtype, "")
    if wanted == "":
        raise CheckpointError(f"dtype {dtype!r} is not one of bf16, fp16, fp32")
    types = {ours: wanted or manifest.arrays[f"weight/{ours}"].dtype for ours in names}

    def write(fresh: Path) -> None:
        _write_shards(files, manifest, fresh, names, types, shard_bytes)
        config = described | _of_data(manifest, types["embed.weight"])
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, fresh)

    return write_whole(folder, write)


def _write_shards(
    files: Files, manifest: Manifest, folder: Path, names: dict[str, str], types: dict[str, str], shard_bytes: int
) -> None:
    def size(ours: str) -> int:
        array = manifest.arrays[f"weight/{ours}"]
        return array.bytes // array.item_bytes * ITEM_BYTES[types[ours]]

    shards: list[list[str]] = [[]]
    filled = 0
    for ours in names:
        if shards[-1] and filled + size(ours) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(ours)
        filled += size(ours)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for ours in shard:
            shape = manifest.arrays[f"weight/{ours}"].shape
            header[names[ours]] = {"dtype": types[ours], "shape": shape, "data_offsets": (at, at + size(ours))}
            at += size(ours)
            index[names[ours]] = name
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        with (folder / name).open("wb") as output:
            output.write(len(text).to_bytes(8, "little") + text)
            for ours in shard:
                values = read_array(files, manifest, f"weight/{ours}").to(TORCH_DTYPES[types[ours]])
                output.write(bytes_of(values))
    if len(shards) > 1:
        total = sum(size(ours) for ours in names)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2) + "\n")


def _family_and_config(files: Files, manifest: Manifest) -> tuple[Family, DecoderConfig]:
    """The model's recipe as it was saved with the run."""
    node = manifest.state.get("config", {}).get("model", {})
    family = FAMILIES.get(node.get("name", "llama"))
    if family is None:
        raise CheckpointError(f"{files.label()}: model {node['name']!r} is of no family that can be exported: {_known()}")
    embedding = manifest.arrays.get("weight/embed.weight")
    try:
        return family, decoder_config(node, None if embedding is None else embedding.shape[0])
    except TypeError as error:
        raise CheckpointError(f"{files.label()}: in the saved config {error}; only {_known()} can be exported") from error


def _known() -> str:
    return ", ".join(FAMILIES)


def _of_data(manifest: Manifest, dtype: str) -> dict[str, Any]:
    """The keys of config.json that follow from the data and the stored types."""
    data = manifest.state.get("config", {}).get("data", {})
    length = data.get("seq_len") if isinstance(data, dict) else None
    return {
        "max_position_embeddings": length if isinstance(length, int) else 8192,
        "torch_dtype": {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}[dtype],
    }


def _copy_tokenizer(source: Path, folder: Path) -> None:
    file = source / "tokenizer.json" if source.is_dir() else source
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no tokenizer.json")
    shutil.copyfile(file, folder / "tokenizer.json")
    beside = file.parent / "tokenizer_config.json"
    if beside.is_file():
        shutil.copyfile(beside, folder / "tokenizer_config.json")
        return
    tokens = [entry["content"] for entry in json.loads(file.read_text()).get("added_tokens", [])]
    known = ("<|endoftext|>", "<|end_of_text|>", "<|eod|>", "</s>", "<eos>")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    ends = [token for token in known if token in tokens]
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | ({"eos_token": ends[0]} if ends else {}), indent=2) + "\n"
    )


def import_hf(source: Path, folder: str | Path, tokenizer: Path | None = None) -> Path:
    """Make a checkpoint (step 0, weights only) out of a Hugging Face folder. Host memory holds one array at a time.

    Its state carries the model's recipe as `config.model`. Raises CheckpointError for another architecture, a scaled
    rotary embedding, or a file or weight that is missing.
    """
    theirs, family, model = _from_hf_config(source)
    with ExitStack() as stack:
        readers = _open_shards(source, stack)
        names = family.names(decoder_config(model))
        sources: list[Source] = []
        for ours, name in names.items():
            if name not in readers:
                raise CheckpointError(f"{source}: the weight {name} is missing")
            reader = readers[name]
            part = reader.get_slice(name)
            dtype = TORCH_DTYPES.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{source}: {name} has the unknown type {part.get_dtype()}")
            sources.append(Source(ours, "weight", dtype, tuple(part.get_shape()), _getter(reader, name)))
        extra = set(readers) - set(names.values()) - {"lm_head.weight"}
        extra = {name for name in extra if not name.endswith("rotary_emb.inv_freq")}
        if extra:
            raise CheckpointError(f"{source}: weights that Meshloom's model does not have: {', '.join(sorted(extra)[:6])}")
        state = {"config": {"model": model}, "imported_from": {"format": "hugging_face", "config": theirs}}
        carried = carry_tokenizer(source, tokenizer)
        return compose(folder, 0, sources, state | carried.state, carried.files)


def _getter(reader: Any, name: str) -> Callable[[], torch.Tensor]:
    return lambda: reader.get_tensor(name)


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
    if (source / INDEX).is_file():
        weight_map: dict[str, str] = json.loads((source / INDEX).read_text())["weight_map"]
        yield from (source / name for name in sorted(set(weight_map.values())))
    else:
        yield source / "model.safetensors"


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
