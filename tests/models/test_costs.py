"""The costs of a decoder, held to what PyTorch counts of the module itself and to published sizes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meshloom.models.config import DecoderConfig
from meshloom.models.costs import flops_per_token, head_flops, layer_flops, parameter_count
from support.models import decoder

SHAPE = {"dim": 24, "layers": 3, "heads": 4, "kv_heads": 2, "ffn_dim": 36, "vocabulary": 61}


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_module(tied: bool) -> None:
    model = decoder(**SHAPE, tied=tied)  # type: ignore[arg-type]
    config = DecoderConfig(**SHAPE, tied=tied)  # type: ignore[arg-type]
    assert parameter_count(config) == sum(weight.numel() for weight in model.parameters())
    without = parameter_count(config) - (0 if tied else 61 * 24)
    assert parameter_count(config, embedding=False) == without


def test_parameters_of_llama_3_8b_are_as_published() -> None:
    config = DecoderConfig(dim=4096, layers=32, heads=32, kv_heads=8, ffn_dim=14336, vocabulary=128256)
    assert parameter_count(config) == 8_030_261_248  # of meta-llama/Meta-Llama-3-8B's safetensors index


def test_flops_are_those_that_pytorch_counts() -> None:
    """PyTorch counts all pairs of positions, of which causality leaves half."""
    model, config = decoder(**SHAPE), DecoderConfig(**SHAPE)  # type: ignore[arg-type]
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logits = model(tokens)
    block, attention = config.block(0), 4 * 24 * 16
    assert forward.get_total_flops() == 32 * (3 * (2 * block.matrices + attention) + head_flops(config))
    assert layer_flops(block, 16) == 2 * block.matrices + attention / 2
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    norms = 6 * (2 * 3 + 1) * 24  # the convention counts their weights as if they were matrices
    assert flops_per_token(config, 16) - norms == (forward.get_total_flops() + backward.get_total_flops()) / 32


def test_a_window_counts_the_pairs_that_it_leaves() -> None:
    config = DecoderConfig(**SHAPE, layer_types=["sliding"], sliding_window=5)  # type: ignore[arg-type]
    for seq_len in (4, 5, 12):
        seen = sum(min(position + 1, 5) - 0.5 for position in range(seq_len))
        whole = DecoderConfig(**SHAPE).block(0).attention.score_flops(seq_len)  # type: ignore[arg-type]
        assert config.block(0).attention.score_flops(seq_len) / whole == pytest.approx(2 * seen / seq_len**2)


def test_costs_need_no_torch() -> None:
    modules = ("meshloom.models.costs", "meshloom.parallel.policies", "meshloom.parallel.pipeline.stages")
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_active_parameters_of_a_mixture_are_counted_apart() -> None:
    shape = {"dim": 8, "layers": 2, "heads": 2, "kv_heads": 2, "ffn_dim": 20, "vocabulary": 11}
    experts = {"count": 6, "top_k": 2, "ffn_dim": 5, "shared": 1, "dense_layers": 1}
    config = DecoderConfig.of({**shape, "experts": experts})
    total = sum(parameter.numel() for parameter in decoder(**shape, experts=experts).parameters())
    assert parameter_count(config) == total
    assert parameter_count(config, active=True) == total - 4 * 3 * 8 * 5  # four experts of the second layer are not chosen


def test_the_cell_of_recurrent_routers_is_held_once_and_computed_in_each_layer() -> None:
    shape = {"dim": 8, "layers": 3, "heads": 2, "kv_heads": 2, "ffn_dim": 20, "vocabulary": 11}
    experts = {"count": 6, "top_k": 6, "ffn_dim": 5, "router": "recurrent", "state_dim": 4}
    config = DecoderConfig.of({**shape, "experts": experts})
    total = sum(parameter.numel() for parameter in decoder(**shape, experts=experts).parameters())
    assert parameter_count(config) == parameter_count(config, active=True) == total
    plain = DecoderConfig.of({**shape, "experts": {"count": 6, "top_k": 6, "ffn_dim": 5}})
    cell, own = 6 * 4 * 4 + 6 * 4, 4 * 8 + 6 * 4 - 6 * 8  # a layer's projection and logits, in place of logits alone
    assert flops_per_token(config, 16) - flops_per_token(plain, 16) == 3 * 6 * (cell + own)


def test_experts_without_a_gate_hold_two_matrices() -> None:
    shape = {"dim": 8, "layers": 2, "heads": 2, "kv_heads": 2, "ffn_dim": 20, "vocabulary": 11, "ffn_bias": True}
    experts = {"count": 6, "top_k": 6, "ffn_dim": 5, "router": "relu", "gated": False}
    total = sum(parameter.numel() for parameter in decoder(**shape, experts=experts).parameters())
    assert parameter_count(DecoderConfig.of({**shape, "experts": experts})) == total
