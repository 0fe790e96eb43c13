"""Llama models to and from the Hugging Face layout: safetensors files, config.json, tokenizer.

The rotary convention is the same (rotate half), so weights keep their values and only change their names.
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

from ..compose import Source, compose
from ..dtypes import TORCH_DTYPES, bytes_of
from ..errors import CheckpointError
from ..files import Files
from ..folder import open_step
from ..manifest import ITEM_BYTES, Manifest
from ..tools import read_array
from .whole import write_whole

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
_LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.w1.weight": "mlp.gate_proj.weight",
    "ffn.w2.weight": "mlp.down_proj.weight",
    "ffn.w3.weight": "mlp.up_proj.weight",
}
_OUTER_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def names_of_llama(layers: int, tied: bool) -> dict[str, str]:
    """Meshloom's parameter names → Hugging Face's, of a Llama of this depth."""
    names = {ours: theirs for ours, theirs in _OUTER_NAMES.items() if not (tied and ours == "head.weight")}
    for layer in range(layers):
        names |= {f"layers.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in _LAYER_NAMES.items()}
    return names


def export(
    files: Files, folder: Path, *, dtype: str | None = None, tokenizer: Path | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write a step's weights as a folder that `transformers` loads. Host memory holds one array at a time.

    dtype: bf16, fp16 or fp32; None keeps the stored type. tokenizer: a tokenizer.json, or a folder with one, to put in.
    Raises CheckpointError if the checkpoint is not of a plain Llama or the folder exists.
    """
    manifest = open_step(files)
    model = _model_config(files, manifest)
    names = names_of_llama(model["layers"], model["tied"])
    stored = {key.removeprefix("weight/") for key in manifest.arrays if key.startswith("weight/")}
    if stored - set(names) - {"head.weight"} or set(names) - stored:
        odd = sorted(stored ^ set(names))
        raise CheckpointError(f"{files.label()}: not the weights of a plain Llama: {', '.join(odd[:6])}")
    wanted = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", None: None}.get(dtype, "")
    if wanted == "":
        raise CheckpointError(f"dtype {dtype!r} is not one of bf16, fp16, fp32")
    types = {ours: wanted or manifest.arrays[f"weight/{ours}"].dtype for ours in names}

    def write(fresh: Path) -> None:
        _write_shards(files, manifest, fresh, names, types, shard_bytes)
        config = _to_hf_config(model, manifest, types["embed.weight"])
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


def _model_config(files: Files, manifest: Manifest) -> dict[str, Any]:
    """The model's recipe as it was saved with the run."""
    model = manifest.state.get("config", {}).get("model", {})
    missing = [key for key in ("dim", "layers", "heads", "kv_heads", "ffn_dim") if not isinstance(model.get(key), int)]
    if missing:
        raise CheckpointError(f"{files.label()}: the saved config has no model.{missing[0]}; only a Llama can be exported")
    if model.get("mup_base") or model.get("mup_embedding", 1.0) != 1.0 or model.get("mup_residual", 1.0) != 1.0:
        raise CheckpointError(f"{files.label()}: Hugging Face's Llama has no place for muP's multipliers (model.mup_…)")
    return {"tied": False, "norm_eps": 1e-5, "rope_theta": 500_000.0, **model}


def _to_hf_config(model: dict[str, Any], manifest: Manifest, dtype: str) -> dict[str, Any]:
    data = manifest.state.get("config", {}).get("data", {})
    length = data.get("seq_len") if isinstance(data, dict) else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model["dim"],
        "intermediate_size": model["ffn_dim"],
        "num_hidden_layers": model["layers"],
        "num_attention_heads": model["heads"],
        "num_key_value_heads": model["kv_heads"],
        "head_dim": model["dim"] // model["heads"],
        "vocab_size": manifest.arrays["weight/embed.weight"].shape[0],
        "max_position_embeddings": length if isinstance(length, int) else 8192,
        "rms_norm_eps": model["norm_eps"],
        "rope_theta": model["rope_theta"],
        "rope_parameters": {"rope_type": "default", "rope_theta": model["rope_theta"]},
        "tie_word_embeddings": model["tied"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
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


def import_hf(source: Path, folder: str | Path) -> Path:
    """Make a checkpoint (step 0, weights only) out of a Hugging Face Llama folder. Host memory holds one array at a time.

    Its state carries the model's recipe as `config.model`. Raises CheckpointError for another architecture, a scaled
    rotary embedding, or a file or weight that is missing.
    """
    theirs, model = _from_hf_config(source)
    with ExitStack() as stack:
        readers = _open_shards(source, stack)
        names = names_of_llama(model["layers"], model["tied"])
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
            raise CheckpointError(f"{source}: weights that Meshloom's Llama does not have: {', '.join(sorted(extra)[:6])}")
        state = {"config": {"model": model}, "imported_from": {"format": "hugging_face", "config": theirs}}
        return compose(folder, 0, sources, state)


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


def _from_hf_config(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    path = source / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: not a Hugging Face model folder")
    theirs: dict[str, Any] = json.loads(path.read_text())
    if theirs.get("model_type") != "llama":
        raise CheckpointError(f"{path}: model_type {theirs.get('model_type')!r}; only llama can be imported")
    rope: dict[str, Any] = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    heads = theirs["num_attention_heads"]
    problems = [
        (kind != "default", f"rotary scaling {kind!r}"),
        (theirs.get("attention_bias") or theirs.get("mlp_bias"), "biases"),
        (theirs.get("hidden_act", "silu") != "silu", f"activation {theirs.get('hidden_act')!r}"),
        (theirs.get("head_dim", theirs["hidden_size"] // heads) * heads != theirs["hidden_size"], "a head width of its own"),
    ]
    for wrong, what in problems:
        if wrong:
            raise CheckpointError(f"{path}: {what} is something Meshloom's Llama does not have")
    model = {
        "_target_": "meshloom.models.llama.Llama",
        "name": "llama",
        "dim": theirs["hidden_size"],
        "layers": theirs["num_hidden_layers"],
        "heads": heads,
        "kv_heads": theirs.get("num_key_value_heads", heads),
        "ffn_dim": theirs["intermediate_size"],
        "vocabulary": theirs["vocab_size"],
        "tied": bool(theirs.get("tie_word_embeddings", False)),
        "norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "rope_theta": float(rope.get("rope_theta", theirs.get("rope_theta", 10_000.0))),
    }
    return theirs, model
