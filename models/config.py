"""Config of `model`: the shape of the network, and what each of its parts is built from. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Self

from ..config.keys import MISSING, Side, key, option, target
from ..config.nodes import Custom
from ..config.problems import Problem
from .mixture.config import ExpertsConfig, MixtureConfig
from .part_config import AttentionConfig, BlockConfig, FeedForwardConfig, LatentAttentionConfig, MatrixScales, NormConfig
from .rope_config import RopeScaling, RotaryConfig

SIZES = ("dim", "layers", "heads", "kv_heads", "ffn_dim")

CHOICES = {
    "attention": ("gqa", "mla"),
    "qk_norm": ("none", "head", "full"),
    "ffn_activation": ("silu", "gelu_tanh", "gelu", "clamped_swiglu"),
    "norm": ("rms", "rms_plus_one"),
    "norm_place": ("before", "after", "around"),
}
"""Key → what it may be."""

LAYER_TYPES = ("full", "sliding", "nope")
"""Kinds of layers."""

DECODER = "meshloom.models.decoder.Decoder"
"""`_target_` of the decoder that this config describes."""


@dataclass(frozen=True)
class LatentConfig:
    """Sizes of multi-head latent attention; the defaults are DeepSeek-V3's, but for its queries' latent of 1536."""

    SIDE: ClassVar[Side] = Side.RECIPE

    q_lora_rank: int | None = key(None, "width of the latent of queries; null: queries have none")
    kv_lora_rank: int = key(512, "width of the latent of keys and values")
    qk_nope_head_dim: int = key(128, "width of a query's or key's head without positions")
    qk_rope_head_dim: int = key(64, "width of the part with rotary positions")
    v_head_dim: int = key(128, "width of a value's head")

    def problems(self, key: str) -> Iterator[Problem]:
        """Yield what is wrong with the values."""
        for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            size = getattr(self, name)
            if size is not None and size < 1:
                yield Problem(f"{key}.{name}", f"{size} is not a size", "use 1 or more")
        if self.v_head_dim > self.qk_nope_head_dim + self.qk_rope_head_dim:
            yield Problem(f"{key}.v_head_dim", "values are wider than keys", f"use {key}.qk_nope_head_dim or less")


@dataclass(frozen=True)
class ModelConfig:
    """Keys of every model."""

    SIDE: ClassVar[Side] = Side.RECIPE

    _target_: str = target(MISSING)
    name: str = option(MISSING)
    vocabulary: int | None = key(None, "tokens the model knows; null: the data's tokenizer says")

    @property
    def shares_weights(self) -> bool:
        """True if two modules share a weight."""
        return False

    def decoder(self) -> DecoderConfig | None:
        """Return the decoder that the keys describe; None if a decoder's sizes are not among them."""
        return None

    @property
    def drops_tokens(self) -> bool:
        """True if experts drop tokens, so that what is computed depends on how the global batch is cut into micro-batches."""
        shape = self.decoder()
        return shape is not None and shape.experts.capacity is not None and bool(shape.mixture_layers())

    def problems(self, key: str = "model") -> list[Problem]:
        """Return what is wrong with the values."""
        return []


@dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """A decoder of parts. The defaults are Llama's: norms before each part, rotary positions, grouped heads, SwiGLU."""

    _target_: str = target(DECODER)
    name: str = option("llama")
    dim: int = key(MISSING, "width of the stream between blocks")
    layers: int = key(MISSING, "number of blocks")
    heads: int = key(MISSING, "query heads")
    kv_heads: int = key(MISSING, "key and value heads; they divide heads")
    head_dim: int | None = key(None, "width of a head; null: dim / heads")
    attention: str = key("gqa", "gqa (grouped-query attention) or mla (multi-head latent attention)")
    mla: LatentConfig = field(default_factory=LatentConfig)
    ffn_dim: int = key(MISSING, "inner width of the feed-forward part")
    tied: bool = key(False, "the head reuses the embedding")
    layer_types: list[str] = key(
        ["full"], "kinds of layers, repeated over them: full, sliding (a window), or nope (full, without positions)"
    )
    sliding_window: int | None = key(None, "positions that a query of a sliding layer sees, its own included")
    qkv_bias: bool = key(False, "biases of the projections to queries, keys and values")
    output_bias: bool = key(False, "a bias of attention's projection back to the stream")
    qk_norm: str = key("none", "RMSNorm of queries and keys: none, head (each head by itself) or full (all heads together)")
    sinks: bool = key(False, "each head has a learned logit in the softmax's sum (gpt-oss)")
    attention_softcap: float | None = key(None, "scores become cap · tanh(score / cap); null: they stay")
    attention_scale: float | None = key(None, "factor on the scores; null: 1 / √head_dim, under muP 1 / head_dim")
    ffn_activation: str = key(
        "silu", "activation of the gate: silu (SwiGLU), gelu_tanh or gelu (GeGLU), clamped_swiglu (gpt-oss)"
    )
    ffn_bias: bool = key(False, "biases of the feed-forward's projections, those of experts too")
    norm: str = key("rms", "rms: RMSNorm times its weight; rms_plus_one: times 1 + weight")
    norm_place: str = key("before", "where norms stand: before each part, after it (OLMo 2), or around it (Gemma 2)")
    norm_eps: float = key(1e-5, "added to the mean square in RMSNorm")
    rope_theta: float = key(500_000.0, "base of the rotary positions' wavelengths")
    rope_theta_sliding: float | None = key(None, "the same of sliding layers; null: rope_theta")
    rope_fraction: float = key(1.0, "share of a head's width that rotates")
    rope_interleaved: bool = key(False, "pairs (2i, 2i + 1) rotate, instead of (i, i + half the width)")
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    embedding_scale: float = key(1.0, "factor on the embedding's output")
    logit_softcap: float | None = key(None, "logits become cap · tanh(logit / cap); null: they stay")
    z_loss: float = key(
        0.0, "adds this times the square of the logits' log-sum-exp to what is minimised; the reported loss is without it"
    )
    init_std: float = key(0.02, "standard deviation of the initial weights")
    mup_base: int | None = key(
        None, "width the hyper-parameters were tuned at (muP, arXiv 2408.13359 table 1); null: standard parametrisation"
    )
    mup_embedding: float = key(1.0, "muP multiplier of the embedding's output")
    mup_residual: float = key(1.0, "muP multiplier of each residual branch")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Make the config from plain values of its keys. Raises TypeError for a key that it does not have."""
        made: dict[str, Any] = dict(values)
        for name, kind in (("rope_scaling", RopeScaling), ("mla", LatentConfig)):
            if isinstance(made.get(name), Mapping):
                made[name] = kind(**made[name])
        if isinstance(made.get("experts"), Mapping):
            made["experts"] = ExpertsConfig.of(made["experts"])
        return cls(**made)

    @property
    def shares_weights(self) -> bool:
        """True if two modules, the embedding and the head, share a weight."""
        return self.tied

    @property
    def stream_width(self) -> int:
        """Width of what passes from block to block: the stream, and the state of recurrent routers."""
        return self.dim + self.experts.carried_dim

    @property
    def head_width(self) -> int:
        """Width of a query's or key's head."""
        if self.attention == "mla":
            return self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def mup_width(self) -> float:
        """muP's m_width: how many times wider than the base the model is; 1 in standard parametrisation."""
        return self.dim / self.mup_base if self.mup_base else 1.0

    @property
    def embedding_factor(self) -> float:
        """The factor on the embedding's output."""
        return self.mup_embedding * self.embedding_scale

    @property
    def known_vocabulary(self) -> int:
        """The vocabulary, of a config in which it is set."""
        assert self.vocabulary is not None, "the vocabulary is not known yet"
        return self.vocabulary

    def mixture_layers(self) -> list[int]:
        """Return the layers whose feed-forward is a mixture of experts."""
        return [layer for layer in range(self.layers) if self.experts.has_mixture(layer)]

    def layer_type(self, layer: int) -> str:
        """Return the kind of a layer; layers count from 0."""
        return self.layer_types[layer % len(self.layer_types)]

    def rotary(self, layer_type: str) -> RotaryConfig | None:
        """Return the rotary positions of the layers of a kind; None if they have no positions."""
        if layer_type == "nope":
            return None
        theta, scaling = self.rope_theta, self.rope_scaling
        if layer_type == "sliding":
            theta = theta if self.rope_theta_sliding is None else self.rope_theta_sliding
            scaling = scaling if scaling.sliding else RopeScaling()
        return RotaryConfig(self.rotary_width, theta, self.rope_interleaved, scaling)

    @property
    def rotary_width(self) -> int:
        """The part of a head's width that rotates."""
        if self.attention == "mla":
            return self.mla.qk_rope_head_dim
        return int(self.head_width * self.rope_fraction)

    def decoder(self) -> DecoderConfig | None:
        """Return the decoder that the keys describe: this one."""
        return self

    def block(self, layer: int) -> BlockConfig:
        """Return what the block of a layer is built from; layers count from 0."""
        assert 0 <= layer < self.layers, f"there is no layer {layer} of {self.layers}"
        scales, after = self._matrix_scales(), self.norm_place in ("after", "around")
        attention = self._attention(self.layer_type(layer), scales)
        ffn: FeedForwardConfig | MixtureConfig
        ffn = FeedForwardConfig(self.dim, self.ffn_dim, scales, self.ffn_activation, self.ffn_bias)
        if self.experts.has_mixture(layer):
            expert = FeedForwardConfig(
                self.dim, self.experts.ffn_dim or self.ffn_dim, scales, self.ffn_activation, self.ffn_bias
            )
            ffn = MixtureConfig(expert, self.experts)
        return BlockConfig(attention, ffn, self.norm_of(self.dim), self.mup_residual, self.norm_place != "after", after)

    def _latent_attention(self, scales: MatrixScales) -> LatentAttentionConfig:
        rotary = self.rotary("full")
        assert rotary is not None
        return LatentAttentionConfig(
            dim=self.dim,
            heads=self.heads,
            nope_dim=self.mla.qk_nope_head_dim,
            value_dim=self.mla.v_head_dim,
            scale=1 / math.sqrt(self.head_width) if self.attention_scale is None else self.attention_scale,
            rotary=rotary,
            scales=scales,
            q_norm=None if self.mla.q_lora_rank is None else self.norm_of(self.mla.q_lora_rank),
            kv_norm=self.norm_of(self.mla.kv_lora_rank),
            softcap=self.attention_softcap,
        )

    def _attention(self, layer_type: str, scales: MatrixScales) -> AttentionConfig | LatentAttentionConfig:
        if self.attention == "mla":
            return self._latent_attention(scales)
        width = self.head_width
        scale = 1 / width if self.mup_base else 1 / math.sqrt(width)
        norms = {"head": (width, width), "full": (self.heads * width, self.kv_heads * width)}.get(self.qk_norm)
        return AttentionConfig(
            dim=self.dim,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=width,
            scale=scale if self.attention_scale is None else self.attention_scale,
            rotary=self.rotary(layer_type),
            scales=scales,
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            window=self.sliding_window if layer_type == "sliding" else None,
            softcap=self.attention_softcap,
            sinks=self.sinks,
            q_norm=None if norms is None else self.norm_of(norms[0]),
            k_norm=None if norms is None else self.norm_of(norms[1]),
        )

    def norm_of(self, width: int) -> NormConfig:
        """Return what a norm over a width is built from."""
        return NormConfig(width, self.norm_eps, self.norm == "rms_plus_one")

    def _matrix_scales(self) -> MatrixScales:
        """Return how matrices inside the blocks begin and learn: muP's, and GPT-2's scaling by depth."""
        std = self.init_std / math.sqrt(self.mup_width)
        return MatrixScales(std, std / math.sqrt(2 * self.layers), 1 / self.mup_width)

    def blocks(self) -> list[BlockConfig]:
        """Return what the block of each layer is built from: one object for all layers of a kind."""
        return list(self._blocks)

    @cached_property
    def _blocks(self) -> tuple[BlockConfig, ...]:
        kinds: dict[tuple[str, bool], BlockConfig] = {}
        found: list[BlockConfig] = []
        for layer in range(self.layers):
            kind = self.layer_type(layer), self.experts.has_mixture(layer)
            if kind not in kinds:
                kinds[kind] = self.block(layer)
            found.append(kinds[kind])
        return tuple(found)

    def problems(self, key: str = "model") -> list[Problem]:
        """Return what is wrong with the values."""
        own = [*self._choice_problems(key), *self._number_problems(key), *self._shape_problems(key)]
        if self.experts.count and not self.experts.gated and self.ffn_activation == "clamped_swiglu":
            fix = f"use another, or {key}.experts.gated=true"
            own.append(Problem(f"{key}.ffn_activation", "clamped_swiglu is a gate, and the experts have none", fix))
        return [*own, *self.experts.problems(f"{key}.experts", self.layers)]

    def _choice_problems(self, key: str) -> Iterator[Problem]:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                yield Problem(f"{key}.{name}", f"there is no '{getattr(self, name)}'", f"use {', '.join(choices)}")
        unknown = [kind for kind in self.layer_types if kind not in LAYER_TYPES]
        if unknown or not self.layer_types:
            said = f"there is no '{unknown[0]}'" if unknown else "is empty"
            yield Problem(f"{key}.layer_types", said, f"use {', '.join(LAYER_TYPES)}")
        elif 1 <= self.layers < len(self.layer_types):
            text = f"names {len(self.layer_types)} layers, but there are {self.layers}"
            yield Problem(f"{key}.layer_types", text, "give the kinds that repeat, or one for each layer")
        slides = "sliding" in self.layer_types
        if slides and self.sliding_window is None:
            yield Problem(
                f"{key}.sliding_window", "is not set, and layer_types has sliding layers", "give it, for example 1024"
            )
        for name in ("sliding_window", "rope_theta_sliding"):
            if not slides and getattr(self, name) is not None:
                fix = f"leave it null, or give {key}.layer_types sliding layers"
                yield Problem(f"{key}.{name}", "no layer slides", fix)

    def _number_problems(self, key: str) -> Iterator[Problem]:
        for name in (*SIZES, "head_dim", "sliding_window", "vocabulary", "mup_base"):
            size = getattr(self, name)
            if size is not None and size < 1:
                yield Problem(f"{key}.{name}", f"{size} is not a size", "use 1 or more")
        above_zero = ("norm_eps", "rope_theta", "rope_theta_sliding", "init_std")
        for name in (*above_zero, "attention_scale", "attention_softcap", "logit_softcap"):
            number = getattr(self, name)
            if number is not None and not 0 < number < math.inf:
                yield Problem(f"{key}.{name}", f"{number} can't be", "use a number above 0")
        for name in ("mup_embedding", "mup_residual", "embedding_scale"):
            if not math.isfinite(getattr(self, name)):
                yield Problem(f"{key}.{name}", f"{getattr(self, name)} can't be", "use a finite number, 1 for none")
        if not 0 <= self.z_loss < math.inf:
            yield Problem(f"{key}.z_loss", f"{self.z_loss} can't be", "use 0 for none, or a small number as 1e-4")

    def _shape_problems(self, key: str) -> Iterator[Problem]:
        if min(self.dim, self.heads, self.kv_heads, self.head_dim or 1) < 1:
            return
        if self.heads % self.kv_heads:
            fits = _near_divisors(self.heads, self.kv_heads)
            message = f"{self.kv_heads} key/value heads don't divide {key}.heads={self.heads}"
            yield Problem(f"{key}.kv_heads", message, f"use {fits}")
        if self.attention == "mla":
            yield from self._latent_problems(key)
        elif self.head_dim is None and self.dim % self.heads:
            fits = f"use {_near_divisors(self.dim, self.heads)}, or give {key}.head_dim"
            yield Problem(f"{key}.heads", f"{self.heads} heads don't divide {key}.dim={self.dim}", fits)
            return
        yield from self._rotary_problems(key)

    def _latent_problems(self, key: str) -> Iterator[Problem]:
        """Yield what latent attention does not have."""
        yield from self.mla.problems(f"{key}.mla")
        plain: dict[str, Any] = {
            "kv_heads": self.heads,
            "head_dim": None,
            "qk_norm": "none",
            "sinks": False,
            "rope_fraction": 1.0,
        }
        plain |= {"qkv_bias": False, "output_bias": False, "layer_types": ["full"], "mup_base": None}
        for name, value in plain.items():
            if getattr(self, name) != value:
                text = f"latent attention has no {name}={getattr(self, name)}"
                fix = f"use {key}.{name}={'null' if value is None else str(value).lower()}, or {key}.attention=gqa"
                yield Problem(f"{key}.{name}", text, fix)

    def _rotary_problems(self, key: str) -> Iterator[Problem]:
        width = self.rotary_width
        if not 0 < self.rope_fraction <= 1:
            yield Problem(f"{key}.rope_fraction", f"{self.rope_fraction} is no share", "use a number above 0, up to 1")
        elif width % 2 or not width:
            whole = self.rope_fraction == 1
            name = "rope_fraction" if not whole else "heads" if self.head_dim is None else "head_dim"
            what = "a head width" if whole else "a rotating width"
            yield Problem(f"{key}.{name}", f"{what} of {width} is odd, and positions rotate pairs", f"change {key}.{name}")
        else:
            yield from self.rope_scaling.problems(f"{key}.rope_scaling", width)


@dataclass(frozen=True)
class CustomModel(ModelConfig, Custom):
    """A model of the user's own. Only its class knows its keys."""

    @property
    def shares_weights(self) -> bool:
        """True if two modules share a weight, as far as a key called `tied` says."""
        return bool(self.keys.get("tied", False))

    def decoder(self) -> DecoderConfig | None:
        """Return the decoder that the keys describe; None if a decoder's sizes are not among them."""
        try:
            found = decoder_config(self.keys)
            return None if found.problems() else found
        except TypeError:
            return None


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
    if missing := [name for name in SIZES if not isinstance(known.get(name), int)]:
        raise TypeError(f"there is no model.{missing[0]}")
    known["vocabulary"] = known.get("vocabulary") or vocabulary
    return DecoderConfig.of(known)


OPTIONS: tuple[type, ...] = (DecoderConfig,)
"""Schemas of the group, known to Hydra as model/base_<name>; the recipes of the group extend them."""
