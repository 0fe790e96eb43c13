"""The small decoders whose logits and gradients another library computed: `tests/fixtures/make_golden_decoder.py`.

Nothing here comes from the model under test: names and shapes are written out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden_decoder.safetensors"
DIM, LAYERS, HEADS, FFN_DIM, VOCABULARY, SEQ_LEN = 16, 2, 4, 12, 11, 9
NORM_EPS, ROPE_THETA = 1e-3, 100.0  # large and small, so that a wrong one shows in a small model
IGNORED = -100


@dataclass(frozen=True)
class Golden:
    """One decoder. mup: the keys of muP, if it is used; documents: lengths of the documents that a sequence is packed of."""

    kv_heads: int = 2
    tied: bool = False
    mup: dict[str, float] = field(default_factory=dict)
    documents: tuple[int, ...] = (SEQ_LEN,)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter → shape. A matrix is (out, in)."""
        kv_dim = self.kv_heads * DIM // HEADS
        block = {
            "attention_norm.weight": (DIM,),
            "attention.wq.weight": (DIM, DIM),
            "attention.wk.weight": (kv_dim, DIM),
            "attention.wv.weight": (kv_dim, DIM),
            "attention.wo.weight": (DIM, DIM),
            "ffn_norm.weight": (DIM,),
            "ffn.w1.weight": (FFN_DIM, DIM),
            "ffn.w2.weight": (DIM, FFN_DIM),
            "ffn.w3.weight": (FFN_DIM, DIM),
        }
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (VOCABULARY, DIM)}
        for layer in range(LAYERS):
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
        return {**shapes, "norm.weight": (DIM,), **({} if self.tied else {"head.weight": (VOCABULARY, DIM)})}

    def weights(self) -> dict[str, torch.Tensor]:
        """Weights as large as trained ones, so that attention is not uniform; fp64. NumPy keeps this generator's stream."""
        draw = np.random.RandomState(0)
        drawn = {name: draw.standard_normal(shape) for name, shape in self.shapes().items()}
        return {
            name: torch.from_numpy(1 + 0.2 * values if values.ndim == 1 else 0.4 * values) for name, values in drawn.items()
        }

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, targets and document ids, each (2, S). The first target of each sequence carries no loss."""
        drawn = torch.from_numpy(np.random.RandomState(1).randint(0, VOCABULARY, (2, SEQ_LEN + 1)))
        targets_BS = drawn[:, 1:].clone()
        targets_BS[:, 0] = IGNORED
        ids_S = torch.repeat_interleave(torch.arange(len(self.documents)), torch.tensor(self.documents))
        return drawn[:, :-1], targets_BS, ids_S.expand(2, -1)


CASES = {
    "grouped heads, own head": Golden(),
    "one key/value head, tied head": Golden(kv_heads=1, tied=True),
    "as many key/value heads": Golden(kv_heads=4),
    "packed documents": Golden(documents=(4, 1, 3, 1)),
    "muP": Golden(mup={"mup_base": 8, "mup_embedding": 12.0, "mup_residual": 0.22}),
}
