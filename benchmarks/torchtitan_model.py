"""Check that our decoder and torchtitan's Llama are one function: equal losses and gradients for the same weights, on a CPU.

    python benchmarks/torchtitan_model.py

The rates of `beside_torchtitan.py` are comparable because they are; each system draws its own initial weights there. Float64
but for torchtitan's rotary positions, which are fp32; a small model with grouped heads. torchtitan turns neighbouring pairs of
a head's features, we turn pairs half a head apart, so rows of the query and key projections change places. Needs
torchtitan==0.2.2 and what it imports.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.models.llama3.model.model import Transformer

from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder

DIM, LAYERS, HEADS, KV_HEADS, VOCABULARY, LENGTH = 64, 3, 8, 2, 211, 48
NAMES = {
    "tok_embeddings": "embed",
    "attention.wq": "attention.wq",
    "feed_forward": "ffn",
    "output": "head",
}


def our_name(theirs: str) -> str:
    """A parameter's name in our model."""
    for old, new in NAMES.items():
        theirs = theirs.replace(old, new)
    return theirs


def half_apart(rows: torch.Tensor) -> torch.Tensor:
    """Rows of a query or key projection, whose pairs (2i, 2i + 1) within a head become (i, i + E/2)."""
    width = DIM // HEADS
    return rows.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)


def main() -> None:
    """Print the largest relative differences."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    arguments = TransformerModelArgs(
        dim=DIM, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=KV_HEADS, vocab_size=VOCABULARY, multiple_of=32, max_seq_len=LENGTH
    )
    arguments.rope_scaling_args.scaling_factor = 1.0  # theirs stretches long wavelengths as Llama 3.1 does, at no cost
    theirs = Transformer(arguments)
    with torch.no_grad():
        theirs.init_weights()  # rotary tables, too
        for weight in theirs.parameters():
            weight.normal_(std=0.3)  # trained weights are larger than initial ones: attention is not uniform
    ffn_dim = theirs.layers["0"].feed_forward.w1.weight.shape[0]
    ours = Decoder(DecoderConfig(
        dim=DIM, layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, ffn_dim=ffn_dim, vocabulary=VOCABULARY,
        norm_eps=arguments.norm_eps, rope_theta=arguments.rope_theta,
    ))  # fmt: skip
    turned = {name: name.endswith(("wq.weight", "wk.weight")) for name, _ in theirs.named_parameters()}
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            own[our_name(name)].copy_(half_apart(weight) if turned[name] else weight)
    tokens = torch.randint(0, VOCABULARY, (4, LENGTH + 1))
    logits = theirs(tokens[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    found = ours(tokens[:, :-1], tokens[:, 1:])
    expected.backward()
    found.backward()
    worst = 0.0
    for name, weight in theirs.named_parameters():
        assert weight.grad is not None
        gradient, same = half_apart(weight.grad) if turned[name] else weight.grad, own[our_name(name)].grad
        assert same is not None
        worst = max(worst, float((same - gradient).norm() / gradient.norm()))
    mine, other = found.item(), expected.item()
    print(f"loss {mine:.12f}, torchtitan's {other:.12f}: {abs(mine / other - 1):.1e} apart")
    print(f"gradients of {len(own)} parameters: {worst:.1e} apart at most")


if __name__ == "__main__":
    main()
