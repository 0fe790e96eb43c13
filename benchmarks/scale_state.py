"""The state that a rank of a large run holds: its boxes of weights and moments, for published models on given layouts.

No model is built: names, shapes and cuts follow from the sizes, by the arithmetic of `parallel/layout.py` (coordinates) and
`parallel/shards.py` (`chunk`).
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from meshloom.checkpoint.planning.description import Declaration, Description, Entry, Holdings, encode_entries
from meshloom.parallel.box import Box
from meshloom.parallel.layout import Layout

ROLES = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Tensor:
    """One parameter. dim: that tensor parallelism cuts; None: none. layer: −1 the first stage's, −2 the last one's."""

    name: str
    shape: tuple[int, ...]
    layer: int
    dim: int | None = None
    expert: bool = False


def llama(layers: int, dim: int, ffn: int, kv: int, vocabulary: int = 128256) -> list[Tensor]:
    """List the parameters of a Llama. kv: rows of the key's and value's projections."""
    found = [Tensor("embed.weight", (vocabulary, dim), -1, 0)]
    for layer in range(layers):
        at = f"layers.{layer}"
        found += [Tensor(f"{at}.{name}.weight", (dim,), layer) for name in ("attention_norm", "ffn_norm")]
        for name, rows in (("wq", dim), ("wk", kv), ("wv", kv)):
            found.append(Tensor(f"{at}.attention.{name}.weight", (rows, dim), layer, 0))
        found.append(Tensor(f"{at}.attention.wo.weight", (dim, dim), layer, 1))
        found += [Tensor(f"{at}.ffn.{name}.weight", (ffn, dim), layer, 0) for name in ("w1", "w3")]
        found.append(Tensor(f"{at}.ffn.w2.weight", (dim, ffn), layer, 1))
    return [*found, Tensor("norm.weight", (dim,), -2), Tensor("head.weight", (vocabulary, dim), -2, 0)]


def deepseek_v3() -> list[Tensor]:
    """List the parameters of DeepSeek-V3: 61 layers, 58 of them with 256 experts, latent attention."""
    dim, found = 7168, [Tensor("embed.weight", (129280, 7168), -1, 0)]
    for layer in range(61):
        at = f"layers.{layer}"
        found += [Tensor(f"{at}.{name}.weight", (dim,), layer) for name in ("attention_norm", "ffn_norm")]
        found += [
            Tensor(f"{at}.attention.{name}.weight", (rows,), layer) for name, rows in (("q_norm", 1536), ("kv_norm", 512))
        ]
        found.append(Tensor(f"{at}.attention.wq_a.weight", (1536, dim), layer))
        found.append(Tensor(f"{at}.attention.wq_b.weight", (128 * 192, 1536), layer, 0))
        found.append(Tensor(f"{at}.attention.wkv_a.weight", (576, dim), layer))
        found.append(Tensor(f"{at}.attention.wkv_b.weight", (128 * 256, 512), layer, 0))
        found.append(Tensor(f"{at}.attention.wo.weight", (dim, 128 * 128), layer, 1))
        ffn = 18432 if layer < 3 else 2048
        inside = "ffn" if layer < 3 else "ffn.shared"
        found += [Tensor(f"{at}.{inside}.{name}.weight", (ffn, dim), layer, 0) for name in ("w1", "w3")]
        found.append(Tensor(f"{at}.{inside}.w2.weight", (dim, ffn), layer, 1))
        if layer >= 3:
            found.append(Tensor(f"{at}.ffn.router.weight", (256, dim), layer))
            found.append(Tensor(f"{at}.ffn.router.bias", (256,), layer))
            found += [Tensor(f"{at}.ffn.experts.{name}", (256 * 2048, dim), layer, expert=True) for name in ("w1", "w3")]
            found.append(Tensor(f"{at}.ffn.experts.w2", (256 * dim, 2048), layer, expert=True))
    return [*found, Tensor("norm.weight", (dim,), -2), Tensor("head.weight", (129280, dim), -2, 0)]


MODELS = {
    "8B": lambda: llama(32, 4096, 14336, 1024),
    "70B": lambda: llama(80, 8192, 28672, 1024),
    "671B": deepseek_v3,
}


def layouts(model: str, ranks: int) -> dict[str, Layout]:
    """Return layouts of a model on a number of ranks, a power of two of at least 64, by name."""
    if model == "671B":
        pp = 8 if ranks >= 512 else 1
        shard = ranks // pp
        return {f"pp {pp} × shard {shard}, ep 64": Layout(pp=pp, shard=shard, ep=min(64, shard))}
    found = {f"tp 8 × shard {ranks // 8}": Layout(tp=8, shard=ranks // 8), f"shard {ranks}": Layout(shard=ranks)}
    if ranks >= 256:
        found[f"pp 4 × replicate {ranks // 256} × shard 8 × tp 8"] = Layout(pp=4, replicate=ranks // 256, shard=8, tp=8)
    return found


def _cut(box: Box, dim: int, count: int, index: int) -> Box:
    piece = -(-box.shape[dim] // count)
    start = min(index * piece, box.shape[dim])
    return box.cut(dim, start, min(piece, box.shape[dim] - start))


def stage_of(tensor: Tensor, layers: int, layout: Layout) -> int:
    """Return the pipeline stage of a parameter."""
    return {-1: 0, -2: layout.pp - 1}.get(tensor.layer, max(tensor.layer, 0) * layout.pp // layers)


def box_of(tensor: Tensor, layers: int, layout: Layout, rank: int) -> Box | None:
    """Return the box that a rank holds of a parameter; None if it holds nothing of it."""
    at, expert = layout.coordinates(rank), layout.expert_coordinates(rank)
    if stage_of(tensor, layers, layout) != at["pp"]:
        return None
    box = Box.whole(tensor.shape)
    if tensor.expert and layout.ep > 1:
        box = _cut(box, 0, layout.ep, expert["ep"])
        box = _cut(box, 0, layout.expert_weights, expert["expert_weights"])
    else:
        if tensor.dim is not None:
            box = _cut(box, tensor.dim, layout.tp, at["tp"])
        box = _cut(box, 0, layout.weight_ranks, at["shard"] * layout.cp + at["cp"])
    return box if box.numel else None


def declarations(tensors: list[Tensor], layout: Layout, rank: int) -> Iterator[Declaration]:
    """Yield what a rank declares: fp32 masters and two moments."""
    layers = 1 + max(tensor.layer for tensor in tensors)
    for tensor in tensors:
        box = box_of(tensor, layers, layout, rank)
        if box is not None:
            for role in ROLES:
                yield Declaration(tensor.name, role, "F32", tensor.shape, (), box)


def describe(tensors: list[Tensor], layout: Layout, ranks: range) -> Description:
    """Describe the state of a run of ranks, as they would have joined it on the way up the tree."""
    layers = 1 + max(tensor.layer for tensor in tensors)
    tables: dict[tuple[object, ...], Holdings | None] = {}
    numbers: dict[tuple[object, ...], int] = {}
    entries: list[Entry] = []
    for role in ROLES:
        for tensor in sorted(tensors, key=lambda tensor: tensor.name):
            stage = stage_of(tensor, layers, layout)
            cut = tensor.shape, tensor.dim if layout.tp > 1 else None, tensor.expert, stage
            if cut not in tables:
                tables[cut] = _holdings(tensor, layers, layout, ranks)
            if tables[cut] is not None:
                entries.append(Entry(tensor.name, role, "F32", tensor.shape, (), numbers.setdefault(cut, len(numbers))))
    held = sorted(entries, key=lambda entry: entry.key)
    order = {number: at for at, number in enumerate(dict.fromkeys(entry.cut for entry in held))}
    by_number = {number: tables[cut] for cut, number in numbers.items()}
    return Description(
        encode_entries([Entry(e.name, e.role, e.dtype, e.shape, e.splits, order[e.cut]) for e in held]),
        tuple(table for number in order if (table := by_number[number]) is not None),
    )


def _holdings(tensor: Tensor, layers: int, layout: Layout, ranks: range) -> Holdings | None:
    stage, size = stage_of(tensor, layers, layout), layout.stage_ranks
    holders = range(max(ranks.start, stage * size), min(ranks.stop, (stage + 1) * size))
    rows = [(rank, box) for rank in holders if (box := box_of(tensor, layers, layout, rank)) is not None]
    if not rows:
        return None
    columns = (np.array([getattr(box, name) for _, box in rows], np.int64) for name in ("offsets", "shape"))
    return Holdings(np.array([rank for rank, _ in rows], np.int64), *columns)
