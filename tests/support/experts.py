"""The balance of a mixture of experts as closed forms over a whole batch, differentiated by autograd; written from the papers.

Nothing here uses the charges or the counts of the tested code, only a mixture's input and its router's weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from meshloom.models.decoder import Decoder
from meshloom.models.mixture.balance_config import BalanceConfig


def plain_choice(scores: Sequence[float], top_k: int, groups: int = 1, top_groups: int = 1) -> list[int]:
    """Choose a token's experts by sorting in Python, as DeepSeek-V3's report describes it."""
    size = len(scores) // groups
    members = [list(range(group * size, (group + 1) * size)) for group in range(groups)]
    best = sorted(members, key=lambda group: -sum(sorted((scores[expert] for expert in group), reverse=True)[:2]))
    return sorted((expert for group in best[:top_groups] for expert in group), key=lambda expert: -scores[expert])[:top_k]


class PlainBalance:
    """Sees the inputs of a model's mixtures, and computes what is added to the loss of a step."""

    def __init__(self, model: Decoder, config: BalanceConfig, micro: int) -> None:
        """micro: sequences of a micro-batch."""
        self._config, self._micro = config, micro
        self._mixtures: dict[str, Any] = {name: model.layers[name].ffn for name in map(str, model.config.mixture_layers())}
        self._inputs: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._chunk_rate, self._chunks, self._windows = config.chunk_sparsity, list[float](), list[float]()
        self._cell: Any = model.router_cell
        self._state: torch.Tensor | None = None
        even = torch.full((max(1, model.config.experts.count),), 1.0 / max(1, model.config.experts.count)).double()
        self._past = dict.fromkeys(self._mixtures, even)
        for name, mixture in self._mixtures.items():
            mixture.register_forward_pre_hook(lambda _, inputs, name=name: self._inputs.update({name: inputs[0][0]}))

    def loss(self, counted_BS: torch.Tensor) -> torch.Tensor:
        """The sum over layers, as a mean over the tokens that count."""
        self._state, self._chunks = None, []
        return sum((self._layer(name, counted_BS) for name in self._mixtures), torch.zeros((), dtype=torch.float64))

    def _read(self, name: str, router: Any) -> torch.Tensor:
        """Return that in which a layer's logits are linear: the mixture's input, or the state of PyTorch's own cell there."""
        x_BSD = self._inputs[name]
        if self._cell is None:
            return x_BSD
        weights = dict(self._cell.named_parameters())
        width = weights["weight_hh"].shape[1]
        cell = torch.nn.GRUCell(width, width, dtype=x_BSD.dtype)
        inputs = ((x_BSD @ router.project.T).flatten(0, 1), self._state)
        self._state = torch.func.functional_call(cell, weights, inputs)
        return self._state.unflatten(0, x_BSD.shape[:2])

    def _layer(self, name: str, counted_BS: torch.Tensor) -> torch.Tensor:
        keys, config = self._mixtures[name].keys, self._config
        router = self._mixtures[name].router
        logit_bias = getattr(router, "logit_bias", None)
        logits = self._read(name, router) @ router.weight.T + (0 if logit_bias is None else logit_bias)
        if keys.router == "relu":
            p = logits.relu() / (logits.relu().sum(-1, keepdim=True) + 1e-5)
            hits = (logits.detach() > 0).double()
        else:
            scores = logits.softmax(-1) if keys.scores == "softmax" else logits.sigmoid()
            p = scores / scores.sum(-1, keepdim=True)
            ranked = (scores if router.bias is None else scores + router.bias).detach()
            hits = torch.zeros_like(ranked)
            for row, line in enumerate(ranked.tolist()):
                for at, token in enumerate(line):
                    hits[row, at, plain_choice(token, keys.top_k, keys.groups, keys.top_groups)] = 1
        self._counts[name] = hits[counted_BS].sum(0)
        tokens = counted_BS.sum()

        def weighted(rows: slice, hits_of: slice | None = None) -> torch.Tensor:
            """T' · E · Σ f P over some rows; f from other rows if given."""
            valid = counted_BS[rows]
            seen = hits[hits_of or rows][counted_BS[hits_of or rows]]
            share = seen.sum(0) / seen.sum().clamp(min=1)
            return keys.count * (share * p[rows][valid].sum(0)).sum()

        batch, micro = len(counted_BS), self._micro
        total = config.z_loss * logits.logsumexp(-1)[counted_BS].square().mean()
        cuts = range(0, batch, micro)
        total = total + config.micro_batch * sum(weighted(slice(at, at + micro)) for at in cuts) / tokens
        total = total + config.sequence * sum(weighted(slice(at, at + 1)) for at in range(batch)) / tokens
        if config.counts == "exact":
            lbl = weighted(slice(0, batch)) / tokens
        elif config.counts == "prefix":
            lbl = sum(weighted(slice(at, at + micro), slice(0, at + micro)) for at in cuts) / tokens
        else:
            lbl = keys.count * (self._past[name] * p[counted_BS].mean(0)).sum()
        return total + config.global_coefficient * lbl + self._sparsity(p, logits, counted_BS)

    def _sparsity(self, p: torch.Tensor, logits: torch.Tensor, counted_BS: torch.Tensor) -> torch.Tensor:
        """BlockFFN's objectives: PyTorch's cross-entropy of neighbours, and the chance that a chunk uses an expert."""
        config, total = self._config, torch.zeros((), dtype=torch.float64)
        if not config.locality and not config.chunk_sparsity:
            return total
        for row, counted in enumerate(counted_BS.tolist()):
            steep = logits[row] * config.steepness
            pairs = [at for at in range(len(counted) - 1) if counted[at] and counted[at + 1]]
            for at in pairs if config.locality else ():
                bce = torch.nn.functional.binary_cross_entropy_with_logits(steep[at], steep[at + 1].sigmoid())
                total = total + config.locality * bce
            for start in range(0, len(counted), config.chunk_length):
                tokens = [at for at in range(start, min(start + config.chunk_length, len(counted))) if counted[at]]
                used = len(tokens) * (1 - (1 - p[row, tokens]).prod(0)).mean() / counted_BS.sum()
                self._chunks.append(used.item())
                total = total + self._chunk_rate * used * counted_BS.sum()
        return total / counted_BS.sum()

    def end_step(self) -> None:
        """Take the step's counts into the average, and move biases and the coefficient of chunk sparsity."""
        self._windows.append(sum(self._chunks) / max(1, len(self._mixtures)))
        self._chunks, every = [], self._config.chunk_adjust
        if every and len(self._windows) % every == 0:
            mean = sum(self._windows[-every:]) / every
            if len(self._windows) > max(every, self._config.chunk_steady):
                growth = mean * every / sum(self._windows[-2 * every : -every])
                self._chunk_rate *= max(1.025, growth) if growth > 1 else growth
        for name, counts in self._counts.items():
            keep = self._config.keep
            self._past[name] = keep * self._past[name] + (1 - keep) * counts / counts.sum()
            if self._config.bias_rate:
                self._mixtures[name].router.bias.data += self._config.bias_rate * torch.sign(counts.mean() - counts)
