"""Upcycling (arXiv 2212.05055): a mixture of experts that begins as copies of a dense model's feed-forwards.

Without noise, and with gates that sum to 1, the mixture computes what the dense model did.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...models.build import build_model
from ...models.config import DecoderConfig, decoder_config
from ...models.init import Normal, fill
from ...models.mixture.config import ExpertsConfig
from ...models.protocol import Model
from ...parallel.box import Box
from ..dtypes import TORCH_DTYPES, as_tensor
from ..errors import CheckpointError
from ..files import Files
from ..folder import open_step
from ..manifest import Manifest, StoredArray
from ..reading.compare import parts, read_array
from ..reading.reader import Reader
from .compose import Source, compose
from .inherited import inherit_tokenizer


def upcycle(
    files: Files,
    folder: str | Path,
    experts: ExpertsConfig,
    *,
    noise: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Make a checkpoint (step 0, weights only) of a mixture out of a step of a dense decoder.

    Each expert is a copy of its layer's feed-forward plus normal noise, a function of (seed, name, index). Routers and shared
    experts begin as those of a new run of this seed. Host memory holds an array at a time.

    noise: its standard deviation over the root mean square of the weight that is copied

    Raises CheckpointError for a model that is no dense decoder, and for experts that can't be copies of its feed-forwards.
    """
    manifest = open_step(files)
    model = _mixture_of(files, manifest, experts, noise)
    built = build_model(dataclasses.asdict(model), model.known_vocabulary)
    sources = [
        source
        for name, value in (*built.named_parameters(), *built.saved_buffers().items())
        for source in _sources(files, manifest, built, name, tuple(value.shape), noise, seed)
    ]
    how = {"format": "upcycled", "from": files.label(), "noise": noise, "seed": seed}
    tokenizer = inherit_tokenizer(files, manifest.state)
    state = {"config": {"model": dataclasses.asdict(model)}, "imported_from": how, **tokenizer.state}
    return compose(folder, 0, sources, state, tokenizer.files, overwrite=overwrite)


def _mixture_of(files: Files, manifest: Manifest, experts: ExpertsConfig, noise: float) -> DecoderConfig:
    """Return the mixture's config. Raises CheckpointError for all that is wrong."""
    embedding = manifest.arrays.get("weight/embed.weight")
    node: dict[str, Any] = manifest.state.get("config", {}).get("model", {})
    try:
        dense = decoder_config(node, None if embedding is None else embedding.shape[0])
    except TypeError as error:
        raise CheckpointError(f"{files.label()}: in the saved config {error}; only decoders can be upcycled") from error
    model = dataclasses.replace(dense, experts=experts)
    faults = [f"{each.key}: {each.message}; {each.fix}" for each in model.problems()]
    if dense.mixture_layers():
        faults.append("the model has experts already")
    if experts.count < 1:
        faults.append("experts.count: give the number of experts")
    if not experts.gated:
        faults.append("experts.gated=false: a copy of the dense feed-forward has its gate")
    if experts.ffn_dim not in (None, dense.ffn_dim):
        faults.append(f"experts.ffn_dim={experts.ffn_dim}: a copy is as wide as the dense feed-forward, {dense.ffn_dim}")
    if not 0 <= noise < float("inf"):
        faults.append(f"noise={noise}: use 0 for none, or a small number as 0.01")
    if faults:
        raise CheckpointError(f"{files.label()}: {'; '.join(faults)}")
    return model


def _sources(
    files: Files, manifest: Manifest, model: Model, name: str, shape: tuple[int, ...], noise: float, seed: int
) -> Iterator[Source]:
    block, _, last = name.rpartition(".experts.")
    dense = manifest.arrays.get(f"weight/{block}.{last}.weight" if block else f"weight/{name}")
    if block and dense is not None:
        rows, dtype = dense.shape[0], TORCH_DTYPES[dense.dtype]
        for first in range(0, shape[0], rows):
            read = functools.partial(_copy, files, manifest, dense, name, shape, first, noise, seed)
            yield Source(name, "weight", dtype, shape, read, box=Box((first, *(0 for _ in shape[1:])), dense.shape))
    elif dense is not None:
        for box in parts(dense):
            read = functools.partial(_part, files, manifest, dense, box)
            yield Source(name, "weight", TORCH_DTYPES[dense.dtype], shape, read, box=box)
    elif ".ffn." in name or name.startswith("router_cell."):
        begin = functools.partial(_begin, model, name, shape, seed)
        yield Source(name, "weight", torch.float32, shape, begin)
    else:
        raise CheckpointError(f"{files.label()}: there is no weight/{name}")


def _part(files: Files, manifest: Manifest, array: StoredArray, box: Box) -> torch.Tensor:
    return as_tensor(Reader(files, manifest).read([(array, box)])[0], array.dtype)


def _copy(
    files: Files, manifest: Manifest, dense: StoredArray, name: str, shape: tuple[int, ...], first: int, noise: float, seed: int
) -> torch.Tensor:
    """Return the expert whose rows begin at `first`."""
    values = read_array(files, manifest, dense.key)
    if not noise:
        return values
    drawn = torch.empty(values.shape, dtype=torch.float64)
    offsets = (first, *(0 for _ in shape[1:]))
    fill(drawn, Normal(noise), seed=seed, name=f"{name}/noise", global_shape=shape, offsets=offsets)
    return (values.double() + drawn * values.double().square().mean().sqrt()).to(values.dtype)


def _begin(model: Model, name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return a weight that the dense model does not have, as a new run has it (rule R3)."""
    if name in model.saved_buffers():
        return model.saved_buffers()[name].clone()
    values = torch.empty(shape)
    fill(values, model.initial(name), seed=seed, name=name, global_shape=shape, offsets=(0,) * len(shape))
    return values
