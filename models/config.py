"""Config of `model`: the shape of the network, and what each of its parts is built from. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..config.keys import MISSING, Side, key, option, target
from ..config.nodes import Custom
from ..config.problems import Problem
from .part_config import AttentionConfig, BlockConfig, FeedForwardConfig, MatrixScales, NormConfig

SIZES = ("dim", "layers", "heads", "kv_heads", "ffn_dim")

DECODER = "meshloom.models.decoder.Decoder"
"""`_target_` of the decoder that this config describes."""


@dataclass
class DecoderConfig:
    """A decoder with RMSNorm before each part, rotary positions, grouped-query attention and SwiGLU."""

    SIDE: ClassVar[Side] = Side.RECIPE

    _target_: str = target(DECODER)
    name: str = option("llama")
    dim: int = key(MISSING, "width of the stream between blocks")
    layers: int = key(MISSING, "number of blocks")
    heads: int = key(MISSING, "query heads; they divide dim")
    kv_heads: int = key(MISSING, "key and value heads; they divide heads")
    ffn_dim: int = key(MISSING, "inner width of the feed-forward part")
    vocabulary: int | None = key(None, "tokens the model knows; null: the data's tokenizer says")
    tied: bool = key(False, "the head reuses the embedding")
    norm_eps: float = key(1e-5, "added to the mean square in RMSNorm")
    rope_theta: float = key(500_000.0, "base of the rotary positions' wavelengths")
    init_std: float = key(0.02, "standard deviation of the initial weights")
    mup_base: int | None = key(
        None, "width the hyper-parameters were tuned at (muP, arXiv 2408.13359 table 1); null: standard parametrisation"
    )
    mup_embedding: float = key(1.0, "muP multiplier of the embedding's output")
    mup_residual: float = key(1.0, "muP multiplier of each residual branch")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.dim // self.heads

    @property
    def mup_width(self) -> float:
        """muP's m_width: how many times wider than the base the model is; 1 in standard parametrisation."""
        return self.dim / self.mup_base if self.mup_base else 1.0

    @property
    def known_vocabulary(self) -> int:
        """The vocabulary, of a config in which it is set."""
        assert self.vocabulary is not None, "the vocabulary is not known yet"
        return self.vocabulary

    def block(self, layer: int) -> BlockConfig:
        """Return what the block of a layer is built from; layers count from 0."""
        assert 0 <= layer < self.layers, f"there is no layer {layer} of {self.layers}"
        scale = 1 / self.head_dim if self.mup_base else 1 / math.sqrt(self.head_dim)
        scales = self._matrix_scales()
        return BlockConfig(
            AttentionConfig(self.dim, self.heads, self.kv_heads, self.head_dim, scale, self.rope_theta, scales),
            FeedForwardConfig(self.dim, self.ffn_dim, scales),
            self.norm(),
            self.mup_residual,
        )

    def norm(self) -> NormConfig:
        """Return what a norm of the stream is built from."""
        return NormConfig(self.dim, self.norm_eps)

    def _matrix_scales(self) -> MatrixScales:
        """Return how matrices inside the blocks begin and learn: muP's, and GPT-2's scaling by depth."""
        std = self.init_std / math.sqrt(self.mup_width)
        return MatrixScales(std, std / math.sqrt(2 * self.layers), 1 / self.mup_width)

    def blocks(self) -> list[BlockConfig]:
        """Return what the block of each layer is built from."""
        return [self.block(layer) for layer in range(self.layers)]

    def problems(self, key: str = "model") -> list[Problem]:
        """Return what is wrong with the values."""
        return [*self._number_problems(key), *self._shape_problems(key)]

    def _number_problems(self, key: str) -> Iterator[Problem]:
        for name in (*SIZES, "vocabulary", "mup_base"):
            size = getattr(self, name)
            if size is not None and size < 1:
                yield Problem(f"{key}.{name}", f"{size} is not a size", "use 1 or more")
        for name in ("norm_eps", "rope_theta", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                yield Problem(f"{key}.{name}", f"{getattr(self, name)} can't be", "use a number above 0")
        for name in ("mup_embedding", "mup_residual"):
            if not math.isfinite(getattr(self, name)):
                yield Problem(f"{key}.{name}", f"{getattr(self, name)} can't be", "use a finite number, 1 for none")

    def _shape_problems(self, key: str) -> Iterator[Problem]:
        if min(self.dim, self.heads, self.kv_heads) < 1:
            return
        if self.dim % self.heads:
            fits = _near_divisors(self.dim, self.heads)
            yield Problem(f"{key}.heads", f"{self.heads} heads don't divide {key}.dim={self.dim}", f"use {fits}")
        elif self.dim // self.heads % 2:
            message = f"a head width of {self.dim // self.heads} is odd, and positions rotate pairs"
            yield Problem(f"{key}.heads", message, f"change {key}.heads")
        if self.heads % self.kv_heads:
            fits = _near_divisors(self.heads, self.kv_heads)
            message = f"{self.kv_heads} key/value heads don't divide {key}.heads={self.heads}"
            yield Problem(f"{key}.kv_heads", message, f"use {fits}")


class CustomModel(Custom):
    """A model of the user's own. Only its class knows its keys."""

    @property
    def vocabulary(self) -> int | None:
        """The vocabulary's size, where the node says it."""
        return self.keys.get("vocabulary")

    def problems(self, key: str = "model") -> list[Problem]:
        """Return nothing: only the user's class knows its keys."""
        return []


def _near_divisors(number: int, wanted: int) -> str:
    """Word the divisors of a number next to the one that was wanted."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = [*small, *(number // d for d in small)]
    below = max((d for d in divisors if d <= wanted), default=None)
    above = min((d for d in divisors if d >= wanted), default=None)
    return " or ".join(str(d) for d in dict.fromkeys((below, above)) if d is not None)


def decoder_config(node: Mapping[str, Any], vocabulary: int | None = None) -> DecoderConfig:
    """Read the typed config from the keys of a node that it knows. vocabulary: for a node that leaves it open.

    Raises TypeError where a size is missing.
    """
    known: dict[str, Any] = {field.name: node[field.name] for field in fields(DecoderConfig) if field.name in node}
    if missing := [name for name in ("dim", "layers", "heads", "kv_heads", "ffn_dim") if not isinstance(known.get(name), int)]:
        raise TypeError(f"there is no model.{missing[0]}")
    known["vocabulary"] = known.get("vocabulary") or vocabulary
    return DecoderConfig(**known)


ModelConfig = DecoderConfig | CustomModel
OPTIONS: tuple[type, ...] = (DecoderConfig,)
"""Schemas of the group, known to Hydra as model/base_<name>; the recipes of the group extend them."""
