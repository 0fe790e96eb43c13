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


_PROJECTIONS = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
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


def stored_weights(config: DecoderConfig) -> StoredWeights:
    """Map our parameter names to Hugging Face's. A tied head is stored once, as the embedding."""
    found = {ours: theirs for ours, theirs in _OUTER.items() if not (config.tied and ours == "head.weight")}
    for layer in range(config.layers):
        found |= {f"layers.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in _of_block(config)}
    return {ours: (StoredPart(theirs),) for ours, theirs in found.items()}


def _of_block(config: DecoderConfig) -> Iterator[tuple[str, str]]:
    for ours, theirs in _NORMS[config.norm_place].items():
        yield f"{ours}.weight", f"{theirs}.weight"
    for ours, theirs in _PROJECTIONS.items():
        yield f"attention.{ours}.weight", f"self_attn.{theirs}.weight"
        if config.output_bias if ours == "wo" else config.qkv_bias:
            yield f"attention.{ours}.bias", f"self_attn.{theirs}.bias"
    if config.qk_norm != "none":
        for each in ("q_norm", "k_norm"):
            yield f"attention.{each}.weight", f"self_attn.{each}.weight"
    for ours, theirs in _FEED_FORWARD.items():
        yield f"ffn.{ours}.weight", f"mlp.{theirs}.weight"
        if config.ffn_bias:
            yield f"ffn.{ours}.bias", f"mlp.{theirs}.bias"
