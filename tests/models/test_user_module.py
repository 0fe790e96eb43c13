"""A user's own module trains on every data-parallel layout as in a bare loop; other layouts say what it lacks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from meshloom.config.problems import ConfigError
from meshloom.data.batch import IGNORED, MicroBatch
from meshloom.models.build import build_model
from meshloom.models.init import Filled, Normal, fill
from meshloom.models.protocol import Model, may_skip_weights
from meshloom.models.user_module import defaults_used
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.parallel.capabilities import model_problems
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.policies import ActivationSettings
from support.compiling import counted_graphs
from support.models import decoder
from support.parity import VOCABULARY, Work, sample, take_steps
from support.ranks import run_ranks
from support.settings import settings_of

RATE, STEPS = 2e-3, 4


def gpt(kind: str = "GPT") -> Model:
    return build_model({"_target_": f"support.user_gpt.{kind}", "name": "mine"}, VOCABULARY)


def initial(model: Model, name: str) -> Normal | Filled:
    """Return the default initial distribution, written independently."""
    if name.endswith("bias"):
        return Filled(0.0)
    return Filled(1.0) if "ln_" in name else Normal(0.02)


def plain_losses(kind: str) -> list[float]:
    """Train the oracle: a bare loop on whole batches, on a module that Meshloom has not changed."""
    from support import user_gpt

    model = getattr(user_gpt, kind)(VOCABULARY).double()
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        fill(parameter.data, initial(model, name), seed=7, name=name, global_shape=shape, offsets=(0,) * len(shape))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    losses: list[float] = []
    for number in range(STEPS):
        batch = MicroBatch.collate([sample(index) for index in range(8 * number, 8 * number + 8)])
        logits = model(batch.tokens_BS)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def losses(rank: int, world_size: int, cases: list[tuple[str, Work]]) -> list[list[float]]:
    found: list[list[float]] = []
    for kind, work in cases:
        mesh = Mesh.connect(Layout.plan(work.parallel, world_size), torch.device("cpu"))
        model = gpt(kind)
        settings = settings_of(model, work.parallel, work.activation, precision=work.precision, compile=work.compile, seed=7)
        optimizer = partial(AdamW, AdamWConfig(lr=RATE, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8))
        engine = make_engine(model, mesh, optimizer, work.parallel, settings)  # type: ignore[arg-type]
        found.append(take_steps(engine, work, range(STEPS)).losses)
    return found


def works(*layouts: dict[str, Any], **changes: Any) -> list[Work]:
    return [Work(ParallelConfig(**layout), lr=RATE, micro=2, **changes) for layout in layouts]


DATA_PARALLEL = [{"zero": zero} for zero in range(4)]
HYBRID = [{"zero": zero, "replicate": 2} for zero in (1, 2, 3)]


@pytest.mark.parametrize(("ranks", "layouts"), [(1, [{"zero": 0}]), (2, DATA_PARALLEL), (4, HYBRID)])
def test_it_trains_on_every_data_parallel_layout(ranks: int, layouts: list[dict[str, Any]]) -> None:
    cases = [(kind, work) for kind in ("GPT", "SummedGPT") for work in works(*layouts)]
    expected = {kind: plain_losses(kind) for kind in ("GPT", "SummedGPT")}
    for rank in run_ranks(ranks, losses, cases):
        for (kind, work), found in zip(cases, rank, strict=True):
            assert found == pytest.approx(expected[kind], rel=1e-9), (kind, work.parallel)


def test_its_blocks_are_recomputed() -> None:
    cases = [("GPT", work) for policy in ("full", "selective", "offload") for work in works({"zero": 3}, activation=policy)]
    for found in run_ranks(2, losses, cases)[0]:
        assert found == pytest.approx(plain_losses("GPT"), rel=1e-9)


def losses_compiled(rank: int, world_size: int, work: Work) -> tuple[list[float], int]:
    """Losses, and how many graphs its blocks became."""
    with counted_graphs() as counter:
        (found,) = losses(rank, world_size, [("GPT", work)])
    return found, counter.frame_count


def test_its_blocks_are_compiled() -> None:
    for found, graphs in run_ranks(2, losses_compiled, works({"zero": 3}, compile=True)[0]):
        assert found == pytest.approx(plain_losses("GPT"), rel=1e-9)
        assert graphs > 0


def test_deepspeed_trains_it() -> None:
    pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")
    layouts = [{"engine": "deepspeed", "zero": zero} for zero in range(4)]
    cases = [("GPT", work) for work in works(*layouts, precision="fp32")]
    for found in run_ranks(2, losses, cases)[0]:
        assert found == pytest.approx(plain_losses("GPT"), rel=2e-5)


def test_it_keeps_its_names_its_buffers_and_its_ties() -> None:
    from support.user_gpt import GPT

    model, own = gpt(), GPT(VOCABULARY)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in own.named_parameters()]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), own.buffers(), strict=True))
    assert model.get_parameter("lm_head.weight") is model.get_parameter("wte.weight")
    assert isinstance(model, GPT) and type(model).__name__ == "GPT"


def test_biases_begin_at_zero_whatever_their_prefix() -> None:
    model = build_model({"_target_": "support.user_gpt.TorchLayers", "name": "mine"}, VOCABULARY)
    vectors = {name: model.initial(name) for name, parameter in model.named_parameters() if parameter.dim() == 1}
    ones = {"layers.0.norm1.weight", "layers.0.norm2.weight", "layers.0.layer_scale", "layers.1.norm1.weight"}
    ones |= {"layers.1.norm2.weight", "layers.1.layer_scale"}
    assert {name for name, rule in vectors.items() if rule == Filled(1.0)} == ones
    assert all(vectors[name] == Filled(0.0) for name in vectors.keys() - ones)
    assert {"layers.0.self_attn.in_proj_bias", "rnn.bias_ih_l0", "rnn.bias_hh_l0"} <= vectors.keys()
    (told,) = [line for line in defaults_used(model) if "neither" in line]
    assert told.endswith("begin at one: layers.*.layer_scale")
    assert not any("neither" in line for line in defaults_used(gpt()))


def test_missing_methods_are_told_once() -> None:
    said = "\n".join(defaults_used(gpt()))
    assert "its 3 modules GPTBlock" in said and "initial(name)" in said and "weight decay applies to matrices" in said
    of_summed = "\n".join(defaults_used(gpt("SummedGPT")))
    assert "decays(name)" not in of_summed and "no ModuleList or ModuleDict" in of_summed


@pytest.mark.parametrize(
    ("parallel", "settings", "key", "words"),
    [
        ({"tp": 2}, {}, "parallel.tp", "wte"),
        ({"pp": 2}, {}, "parallel.pp", "carve"),
        ({"cp": 2}, {}, "parallel.cp", "use_kernels"),
        ({}, {"budget": 0.5}, "trainer.activation_budget", "decoder_config"),
    ],
)
def test_it_is_told_by_name_what_it_lacks(parallel: dict[str, Any], settings: dict[str, Any], key: str, words: str) -> None:
    (problem,) = model_problems(gpt(), ParallelConfig(**parallel), ActivationSettings(**settings))
    assert problem.key == key and words in problem.message and problem.fix
    assert model_problems(gpt(), ParallelConfig(), ActivationSettings()) == []


def test_policies_need_blocks() -> None:
    assert model_problems(gpt(), ParallelConfig(), ActivationSettings("full")) == []
    (problem,) = model_problems(gpt("SummedGPT"), ParallelConfig(), ActivationSettings("full"))
    assert problem.key == "trainer.activation" and "block_modules" in problem.message


def test_an_attribute_by_the_name_of_a_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="has an attribute initial"):
        build_model({"_target_": "support.user_gpt.clashing"}, VOCABULARY)


@pytest.mark.parametrize("shape", [{}, {"experts": {"count": 4, "top_k": 2, "ffn_dim": 7}}], ids=["dense", "mixture"])
def test_ranks_may_skip_weights_of_a_users_own_class_alone(shape: dict[str, Any]) -> None:
    from support.routed import Block, Skipping

    shape = {**Work().llama(), **shape}
    ours = decoder(**shape)
    assert not may_skip_weights(ours)
    assert may_skip_weights(gpt()), "a module that is adopted"
    assert may_skip_weights(Skipping(ours.config)), "a class derived from ours"
    ours.layers["1"].ffn = Block(24)
    assert may_skip_weights(ours), "a part in ours"
