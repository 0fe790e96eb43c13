"""List the parameters of a decoder from its config: names, shapes, and how tensor parallelism cuts them. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..models.config import DecoderConfig
from ..models.mixture.config import MixtureConfig
from ..models.part_config import AttentionConfig, BlockConfig, FeedForwardConfig, LatentAttentionConfig, NormConfig

CELL = "router_cell"
"""Name of what recurrent routers share. Each stage of a pipeline with a mixture has a copy."""


@dataclass(frozen=True)
class ParameterShape:
    """One named parameter.

    shape     of the whole array
    cut_dim   dim that tensor-parallel ranks share; None: each of them has the whole
    cut_most  ranks that can share it; with more, each has the whole
    decays    whether weight decay applies; lr_scale: factor on its learning rate
    stacked   matrices of equal shape that it stacks along its rows
    row_parts  rows of each part that a matrix joins: of each head, or each fused projection
    """

    name: str
    shape: tuple[int, ...]
    cut_dim: int | None = None
    cut_most: int | None = None
    decays: bool = True
    lr_scale: float = 1.0
    stacked: int = 1
    row_parts: tuple[int, ...] = ()

    @property
    def hidden(self) -> bool:
        """True for a matrix of a block, or a stack of them."""
        return self.layer is not None and self.decays and len(self.shape) == 2

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def of_experts(self) -> bool:
        """True for a matrix of a mixture's routed experts, which expert parallelism deals out."""
        return ".experts." in self.name

    @property
    def group(self) -> str:
        """Name of the module whose weights are gathered together."""
        parts = self.name.split(".")
        return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]

    @property
    def layer(self) -> int | None:
        """The block that it belongs to, counted from 0; None outside of the blocks."""
        parts = self.name.split(".")
        return int(parts[1]) if parts[0] == "layers" else None

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """Return the shape of the largest part that a tensor-parallel rank has."""
        if self.cut_dim is None or (self.cut_most is not None and tp > self.cut_most):
            return self.shape
        return tuple(-(-size // tp) if dim == self.cut_dim else size for dim, size in enumerate(self.shape))


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are gathered together: those of a block, of the embedding, of the head.

    kind  a number that groups share whose parameters have the same shapes
    """

    name: str
    layer: int | None
    kind: int
    parameters: tuple[ParameterShape, ...]


@dataclass(frozen=True)
class Inventory:
    """The shape of a decoder and its parameters, from which costs are counted."""

    shape: DecoderConfig
    parameters: tuple[ParameterShape, ...]

    @cached_property
    def groups(self) -> tuple[ParameterGroup, ...]:
        """The groups of the whole model, in order."""
        members: dict[str, list[ParameterShape]] = {}
        for each in self.parameters:
            members.setdefault(each.group, []).append(each)
        kinds: dict[object, int] = {}
        found: list[ParameterGroup] = []
        for name, parameters in members.items():
            shapes = tuple(replace(each, name=each.name.removeprefix(name)) for each in parameters)
            kind = kinds.setdefault(shapes, len(kinds))
            found.append(ParameterGroup(name, parameters[0].layer, kind, tuple(parameters)))
        if self.shape.tied:  # of a head that is not beside its embedding
            borrowed = tuple(replace(each, name="head.weight", decays=True) for each in members["embed"])
            found.append(ParameterGroup("head", None, len(kinds), borrowed))
        return tuple(found)

    def stage(self, layers: range, *, first: bool, last: bool) -> list[ParameterGroup]:
        """List the groups of one pipeline stage. A tied head is a parameter of its own where the embedding is elsewhere."""
        whole, tied = first and last, self.shape.tied
        found: list[ParameterGroup] = []
        for each in self.groups:
            if each.layer is not None:
                found += [each] if whole or each.layer in layers else []
            elif each.name == "embed":
                found += [each] if first else []
            elif each.name == CELL:
                found += [each] if any(map(self.shape.experts.has_mixture, layers)) else []
            elif last and not (whole and tied and each.name == "head"):
                found.append(each)
        return found


def decoder_inventory(shape: DecoderConfig) -> Inventory:
    """List a decoder's parameters, in the order in which the model has them."""
    return Inventory(shape, tuple(_decoder(shape)))


def _decoder(shape: DecoderConfig) -> Iterator[ParameterShape]:
    table = (shape.known_vocabulary, shape.dim)
    yield ParameterShape("embed.weight", table, 0, decays=False)
    listed: dict[int, list[ParameterShape]] = {}
    for layer, block in enumerate(shape.blocks()):  # one object for all layers of a kind
        if id(block) not in listed:
            listed[id(block)] = list(_block(block))
        yield from (replace(each, name=f"layers.{layer}.{each.name}") for each in listed[id(block)])
    yield _norm("norm", shape.norm_of(shape.dim))
    if not shape.tied:
        yield ParameterShape("head.weight", table, 0)
    for name, size in shape.experts.cell_shapes.items():
        matrix = len(size) == 2
        yield ParameterShape(f"{CELL}.{name}", size, decays=matrix, stacked=3 if matrix else 1)


def _block(block: BlockConfig) -> Iterator[ParameterShape]:
    if block.norms_before:
        yield _norm("attention_norm", block.norm)
    parts = _latent(block.attention) if isinstance(block.attention, LatentAttentionConfig) else _attention(block.attention)
    yield from _inside("attention", parts)
    if block.norms_after:
        yield _norm("attention_post_norm", block.norm)
    if block.norms_before:
        yield _norm("ffn_norm", block.norm)
    parts = _mixture(block.ffn) if isinstance(block.ffn, MixtureConfig) else _feed_forward(block.ffn)
    yield from _inside("ffn", parts)
    if block.norms_after:
        yield _norm("ffn_post_norm", block.norm)


def _inside(name: str, parts: Iterator[ParameterShape]) -> Iterator[ParameterShape]:
    return (replace(each, name=f"{name}.{each.name}") for each in parts)


def _norm(name: str, norm: NormConfig, cut_dim: int | None = None, cut_most: int | None = None) -> ParameterShape:
    return ParameterShape(f"{name}.weight", (norm.width,), cut_dim, cut_most, decays=False)


def _attention(part: AttentionConfig) -> Iterator[ParameterShape]:
    rate = part.scales.lr_scale
    # Key and value heads fewer than ranks are not cut: each rank computes the one that it needs.
    for name, width, most in (
        ("wq", part.q_width, None),
        ("wk", part.kv_width, part.kv_heads),
        ("wv", part.kv_width, part.kv_heads),
    ):
        heads = (part.head_dim,) * (width // part.head_dim)
        yield ParameterShape(f"{name}.weight", (width, part.dim), 0, most, lr_scale=rate, row_parts=heads)
        if part.qkv_bias:
            yield ParameterShape(f"{name}.bias", (width,), 0, most, decays=False)
    yield ParameterShape("wo.weight", (part.dim, part.q_width), 1, lr_scale=rate)
    if part.output_bias:
        yield ParameterShape("wo.bias", (part.dim,), decays=False)
    for name, norm, most in (("q_norm", part.q_norm, None), ("k_norm", part.k_norm, part.kv_heads)):
        if norm is not None:  # one of each head's width is whole on every rank
            yield _norm(name, norm, None if norm.width == part.head_dim else 0, most)
    if part.sinks:
        yield ParameterShape("sinks.weight", (part.heads,), 0, decays=False)


def _latent(part: LatentAttentionConfig) -> Iterator[ParameterShape]:
    rate, q_width, latent = part.scales.lr_scale, part.heads * part.head_dim, part.kv_norm.width
    heads, turning = (part.head_dim,) * part.heads, part.rotary.width
    if part.q_norm is None:
        yield ParameterShape("wq.weight", (q_width, part.dim), 0, lr_scale=rate, row_parts=heads)
    else:
        yield ParameterShape("wq_a.weight", (part.q_norm.width, part.dim), lr_scale=rate)
        yield _norm("q_norm", part.q_norm)
        yield ParameterShape("wq_b.weight", (q_width, part.q_norm.width), 0, lr_scale=rate, row_parts=heads)
    yield ParameterShape("wkv_a.weight", (latent + turning, part.dim), lr_scale=rate, row_parts=(latent, turning))
    yield _norm("kv_norm", part.kv_norm)
    both = (part.nope_dim, part.value_dim) * part.heads
    yield ParameterShape("wkv_b.weight", (sum(both), latent), 0, lr_scale=rate, row_parts=both)
    yield ParameterShape("wo.weight", (part.dim, part.heads * part.value_dim), 1, lr_scale=rate)


def _feed_forward(part: FeedForwardConfig, *, cut: bool = True) -> Iterator[ParameterShape]:
    rate = part.scales.lr_scale
    wide, narrow = (part.ffn_dim, part.dim), (part.dim, part.ffn_dim)
    for name, shape, dim in (("w1", wide, 0), ("w2", narrow, 1), ("w3", wide, 0)):
        yield ParameterShape(f"{name}.weight", shape, dim if cut else None, lr_scale=rate)
        if part.bias:
            yield ParameterShape(f"{name}.bias", shape[:1], 0 if cut and dim == 0 else None, decays=False)


def _mixture(part: MixtureConfig) -> Iterator[ParameterShape]:
    """List a mixture's parameters: tensor parallelism cuts its tokens, and every rank has the whole weights."""
    rate, count, width = part.scales.lr_scale, part.keys.count, part.expert.ffn_dim
    yield ParameterShape(
        "router.weight", (count, part.keys.carried_dim or part.dim), lr_scale=1.0 if part.keys.carried_dim else rate
    )
    if part.keys.carried_dim:
        yield ParameterShape("router.project", (part.keys.carried_dim, part.dim), lr_scale=rate)
    if part.keys.router == "relu":
        yield ParameterShape("router.gain", (count,), decays=False)
    if part.keys.logit_bias:
        yield ParameterShape("router.logit_bias", (count,), decays=False)
    wide, narrow = (count * width, part.dim), (count * part.dim, width)
    stacks = {"1": wide, "2": narrow, **({"3": wide} if part.keys.gated else {})}
    for number, shape in stacks.items():
        yield ParameterShape(f"experts.w{number}", shape, lr_scale=rate, stacked=count)
    for number, shape in stacks.items() if part.expert.bias else ():
        yield ParameterShape(f"experts.b{number}", shape[:1], decays=False)
    if part.shared is not None:
        yield from _inside("shared", _feed_forward(part.shared, cut=False))


def parameter_total(parameters: Sequence[ParameterShape]) -> int:
    """Sum the elements."""
    return sum(each.numel for each in parameters)
