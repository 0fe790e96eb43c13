"""A module as a user may bring it: in the manner of GPT-2, and without a word of Meshloom's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder


class GPTBlock(nn.Module):
    """LayerNorm, attention with biases and a mask in a buffer, LayerNorm, GELU."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.c_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("mask", torch.full((length, length), float("-inf")).triu(1), persistent=False)
        self.mask: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.c_attn(self.ln_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + self.mask[: x.shape[1], : x.shape[1]].to(q.dtype)
        x = x + self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    """Tokens to logits, with learned positions and a tied head."""

    def __init__(self, vocabulary: int, width: int = 16, depth: int = 3, heads: int = 2, length: int = 16) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.h = nn.ModuleList(GPTBlock(width, heads, length) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class SummedGPT(nn.Module):
    """One block and no list of them; returns the sum of token losses where it gets targets, and says what decays."""

    def __init__(self, vocabulary: int, width: int = 16) -> None:
        super().__init__()
        self.wte, self.block, self.ln_f = nn.Embedding(vocabulary, width), GPTBlock(width, 2, 16), nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.lm_head(self.ln_f(self.block(self.wte(tokens))))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")

    def decays(self, name: str) -> bool:
        return name.endswith("weight") and "ln_" not in name


class ScaledLayer(nn.TransformerEncoderLayer):
    """PyTorch's block, with a vector that is neither a norm's weight nor a bias."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2, 2 * width, batch_first=True)
        self.layer_scale = nn.Parameter(torch.ones(width))


class TorchLayers(nn.Module):
    """PyTorch's own layers, some of whose biases have names with a prefix."""

    def __init__(self, vocabulary: int, width: int = 8) -> None:
        super().__init__()
        self.wte, self.rnn = nn.Embedding(vocabulary, width), nn.GRU(width, width, batch_first=True)
        self.layers = nn.ModuleList(ScaledLayer(width) for _ in range(2))
        self.lm_head = nn.Linear(width, vocabulary)


def clashing(vocabulary: int) -> nn.Module:
    """A module with an attribute that engines would take for a method."""
    model = GPT(vocabulary)
    model.initial = nn.Linear(2, 2)
    return model


def small_decoder(vocabulary: int) -> Decoder:
    """A decoder whose sizes no key names."""
    return Decoder(DecoderConfig(dim=24, layers=2, heads=3, kv_heads=3, ffn_dim=36, vocabulary=vocabulary))
