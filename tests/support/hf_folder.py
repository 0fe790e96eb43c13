"""Model folders in the layout of Hugging Face, written without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.models.families import family_of

SIZES: dict[str, Any] = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 12, "vocabulary": 61}


def write_model(
    folder: Path, dtype: torch.dtype = torch.float32, kind: str | None = None, **keys: Any
) -> dict[str, torch.Tensor]:
    """Write the folder of a decoder with random weights in two files and an index. Returns its weights, under our names.

    kind: the family, by its model_type; keys: of `model`, besides SIZES; of a family in which each weight is a tensor
    """
    config = DecoderConfig.of({**SIZES, **keys})
    family = family_of(config, kind)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(parameter.shape, generator=generator).mul(0.1).to(dtype)
        for name, parameter in Decoder(config).named_parameters()
    }
    stored = {part.name: weights[ours] for ours, (part,) in family.stored_weights(config).items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family.to_hugging_face(config)))
    write_shards(folder, stored)
    return weights


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors in two files and an index."""
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + (at >= len(names) // 2):05d}-of-00002.safetensors" for at, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name].contiguous() for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
