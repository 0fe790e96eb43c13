"""Parameters listed from a config, held to those of the built model; and the optimizers' state to what a step makes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshloom.models.config import DecoderConfig
from meshloom.optim.optimizers.eight_bit_config import AdamW8bitConfig
from meshloom.optim.optimizers.matrix_config import MatrixOptimConfig, SOAPConfig
from meshloom.optim.optimizers.options import OPTIONS
from meshloom.parallel.layout import Layout
from meshloom.planner.built_model import model_inventory, tried_optimizer
from meshloom.planner.memory import Cutter, optimizer_bytes
from meshloom.planner.parameters import Inventory, decoder_inventory
from meshloom.trainer.build import build_model, optimizer_factory

SHAPE = {"dim": 64, "layers": 4, "heads": 8, "kv_heads": 2, "ffn_dim": 96, "vocabulary": 100}
LATENT = {"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
PARTS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "tied, biases": {"tied": True, "qkv_bias": True, "output_bias": True, "ffn_bias": True},
    "Gemma 3": {"norm_place": "around", "qk_norm": "head", "layer_types": ["sliding", "full"], "sliding_window": 8},
    "OLMo 2": {"norm_place": "after", "qk_norm": "full", "sinks": True, "mup_base": 32},
    "DeepSeek-V3": {
        **{"attention": "mla", "kv_heads": 8, "mla": {"q_lora_rank": 20, **LATENT}},
        "experts": {"count": 8, "ffn_dim": 16, "shared": 1, "dense_layers": 1},
    },
    "RMoE": {"experts": {"count": 4, "router": "recurrent", "state_dim": 6, "layers": [2, 3]}, "mup_base": 32},
    "BlockFFN": {"experts": {"count": 4, "top_k": 4, "router": "relu", "gated": False}, "ffn_bias": True},
    "latent keys only": {"attention": "mla", "kv_heads": 8, "mla": {"q_lora_rank": None, **LATENT}},
}


def stages(inventory: Inventory) -> list[list[tuple[str, tuple[int, ...]]]]:
    cuts = [(range(4), True, True), (range(2), True, False), (range(2, 4), False, True)]
    found = [inventory.stage(layers, first=first, last=last) for layers, first, last in cuts]
    return [[(each.name, each.shape) for group in groups for each in group.parameters] for groups in found]


@pytest.mark.parametrize("parts", PARTS)
def test_a_config_lists_what_the_built_model_has(parts: str) -> None:
    config = DecoderConfig.of({**SHAPE, **PARTS[parts]})
    model, listed = build_model(config, 100), decoder_inventory(config)
    for tp in (1, 2, 4, 8):
        built = model_inventory(model, tp)
        for ours, theirs in zip(listed.parameters, built.parameters, strict=True):
            assert (ours.name, ours.shape, ours.decays, ours.lr_scale, ours.row_parts) == (
                *(theirs.name, theirs.shape, theirs.decays),
                *(theirs.lr_scale, theirs.row_parts),
            )
            assert ours.local_shape(tp) == theirs.local_shape(tp), (ours.name, tp)
    cuts = [(range(4), True, True), (range(2), True, False), (range(2, 4), False, True)]
    carved = [model.carve(layers, first=first, last=last) for layers, first, last in cuts]
    expected = [[(name, tuple(each.shape)) for name, each in stage.named_parameters()] for stage in carved]
    assert list(map(sorted, stages(listed))) == list(map(sorted, expected))


@pytest.mark.parametrize("unit", [4, 8])
@pytest.mark.parametrize("kind", [kind for kind in OPTIONS if not issubclass(kind, (MatrixOptimConfig, AdamW8bitConfig))])
def test_an_optimizers_state_is_what_its_step_makes(kind: Any, unit: int) -> None:
    config = kind()
    count = optimizer_bytes(config)
    assert count is not None
    inventory = decoder_inventory(DecoderConfig.of(SHAPE))
    groups = Cutter(Layout(shard=3, tp=2)).cut(inventory.stage(range(4), first=True, last=True))
    tried = tried_optimizer(optimizer_factory(config))(groups, unit)
    assert replace(count(groups, unit), passes=tried.passes) == tried, "of a class of the user's own passes aren't known"


def test_state_of_whole_matrices_is_shared_out() -> None:
    count = optimizer_bytes(SOAPConfig())
    assert count is not None
    inventory = decoder_inventory(DecoderConfig.of(SHAPE))
    stage = inventory.stage(range(4), first=True, last=True)
    whole, shared = (count(Cutter(layout).cut(stage), 4).state for layout in (Layout(), Layout(shard=3, tp=2)))
    assert whole is not None and shared is not None
    assert whole / 6 <= shared < 1.2 * whole / 6
