"""Names of a decoder's weights in Hugging Face's files. They follow from the decoder's parts and are alike in all families.

The rotary convention is the same (rotate half), so weights keep their values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import DecoderConfig


@dataclass(frozen=True)
class StoredPart:
    """A part of one of our weights, and where it is in the files: some rows of a tensor, in the order of our rows.

    name        of the tensor
    rows        first row and the row after the last, of what the index leaves; None: all
    step        every so many of these rows, where the rows of two weights take turns; it goes with `rows`
    index       in the leading dims of a tensor that stacks several (experts, say)
    transposed  whether the two dims of a matrix are the other way round there
    """

    name: str
    rows: tuple[int, int] | None = None
    step: int = 1
    index: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def is_plain(self) -> bool:
        """True if its values lie there one after the other, as ours do."""
        return self.step == 1 and not self.transposed


StoredWeights = dict[str, tuple[StoredPart, ...]]
"""Our name of a weight → its parts, whose rows are its rows, one after the other. Parts without `rows` are equally long."""


@dataclass(frozen=True)
class MixtureNames:
    """Names of a mixture's weights in a layer. Each expert is a feed-forward of its own there.

    router     its weight; bias: of the choice; experts: before an expert's number; shared: the feed-forward of shared experts
    gate, down, up  an expert's projections
    """

    router: str = "mlp.gate.weight"
    bias: str = "mlp.gate.e_score_correction_bias"
    experts: str = "mlp.experts"
    shared: str = "mlp.shared_experts"
    gate: str = "gate_proj"
    down: str = "down_proj"
    up: str = "up_proj"


_PROJECTIONS = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
_LATENT = {"wkv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "wo": "o_proj"}
_LATENT_QUERIES = {"wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj"}
_FEED_FORWARD = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_OUTER = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_NORMS = {
    "before": {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "after": {"attention_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"},
    "around": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    },
}
"""`norm_place` → our norm → theirs."""


def stored_weights(config: DecoderConfig, mixture: MixtureNames | None = None) -> StoredWeights:
    """Map our parameter names to Hugging Face's. A tied head is stored once, as the embedding.

    mixture: names of its weights; None: those of most families
    """
    outer = ((ours, theirs) for ours, theirs in _OUTER.items() if not (config.tied and ours == "head.weight"))
    found: StoredWeights = {ours: (StoredPart(theirs),) for ours, theirs in outer}
    for layer in range(config.layers):
        of_block = [*_norms(config), *(_latent(config) if config.attention == "mla" else _attention(config))]
        mixes = config.experts.has_mixture(layer)
        if not mixes:
            of_block += _feed_forward("ffn", "mlp", biased=config.ffn_bias)
        found |= {f"layers.{layer}.{ours}": (StoredPart(f"model.layers.{layer}.{theirs}"),) for ours, theirs in of_block}
        if mixes:
            for ours, names in _mixture(config, mixture or MixtureNames()):
                found[f"layers.{layer}.{ours}"] = tuple(StoredPart(f"model.layers.{layer}.{name}") for name in names)
    return found


def _norms(config: DecoderConfig) -> Iterator[tuple[str, str]]:
    for ours, theirs in _NORMS[config.norm_place].items():
        yield f"{ours}.weight", f"{theirs}.weight"


def _attention(config: DecoderConfig) -> Iterator[tuple[str, str]]:
    for ours, theirs in _PROJECTIONS.items():
        yield f"attention.{ours}.weight", f"self_attn.{theirs}.weight"
        if config.output_bias if ours == "wo" else config.qkv_bias:
            yield f"attention.{ours}.bias", f"self_attn.{theirs}.bias"
    if config.sinks:
        yield "attention.sinks.weight", "self_attn.sinks"
    if config.qk_norm != "none":
        for each in ("q_norm", "k_norm"):
            yield f"attention.{each}.weight", f"self_attn.{each}.weight"


def _latent(config: DecoderConfig) -> Iterator[tuple[str, str]]:
    queries = {"wq": "q_proj"} if config.mla.q_lora_rank is None else _LATENT_QUERIES
    for ours, theirs in (queries | _LATENT).items():
        yield f"attention.{ours}.weight", f"self_attn.{theirs}.weight"


def _feed_forward(own: str, their: str, *, biased: bool = False) -> Iterator[tuple[str, str]]:
    for ours, theirs in _FEED_FORWARD.items():
        yield f"{own}.{ours}.weight", f"{their}.{theirs}.weight"
        if biased:
            yield f"{own}.{ours}.bias", f"{their}.{theirs}.bias"


def _mixture(config: DecoderConfig, names: MixtureNames) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield a mixture's weights: our name, and the tensors whose rows are its rows."""
    experts = config.experts
    yield "ffn.router.weight", (names.router,)
    if experts.bias:
        yield "ffn.router.bias", (names.bias,)
    for ours, theirs in (("w1", names.gate), ("w2", names.down), ("w3", names.up)):
        yield f"ffn.experts.{ours}", tuple(f"{names.experts}.{expert}.{theirs}.weight" for expert in range(experts.count))
    if experts.shared:
        for ours, theirs in _feed_forward("ffn.shared", names.shared):
            yield ours, (theirs,)
