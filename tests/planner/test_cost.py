"""The cost model held to what a real engine on the CPU holds: shards and optimizer state to the byte, activations closely."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch.autograd.profiler_util import MEMORY_EVENT_NAME
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from meshloom.data.assignment import Assigner
from meshloom.kernels.experts.fused import FusedExperts
from meshloom.kernels.swiglu import FusedSwiglu
from meshloom.models.block import Block
from meshloom.models.config import DecoderConfig
from meshloom.models.costs import ForwardPass, block_bytes, parameter_count, recomputed_flops
from meshloom.models.decoder import Decoder
from meshloom.models.mixture.charges import Rates
from meshloom.models.mixture.config import MixtureConfig
from meshloom.models.mixture.ledger import Ledger, Routing
from meshloom.models.norm import Norm
from meshloom.models.protocol import BlockKernels
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import AdamWConfig, LionConfig, OptimConfig
from meshloom.optim.optimizers.matrix_config import AdafactorConfig, MuonConfig
from meshloom.parallel.activation import apply_policies
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout, uses_fsdp
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pipeline.stages import (
    SCHEDULES,
    balanced_stages,
    legal_micro_batches,
    stage_count,
    stage_ranks,
    stage_split,
)
from meshloom.parallel.policies import ActivationSettings, block_policies
from meshloom.planner.built_model import model_inventory, tried_optimizer
from meshloom.planner.cost import layout_cost
from meshloom.planner.engines import engine_cost
from meshloom.planner.memory import Job, OptimizerNeeds, optimizer_bytes
from meshloom.planner.orders import pipeline_order
from meshloom.planner.parameters import decoder_inventory
from meshloom.planner.timeline import Costs, Timeline, peak, simulate
from meshloom.trainer.costs import with_kernels
from support.engines import masters_of
from support.models import decoder
from support.parity import SEQ_LEN, Work, build, step
from support.ranks import run_ranks
from support.settings import settings_of
from support.stand_in_kernels import stand_in

ONE_B = DecoderConfig(dim=2048, layers=16, heads=32, kv_heads=8, ffn_dim=8192, vocabulary=128256)


def held(rank: int, world_size: int, work: Work) -> tuple[int, int, int, int]:
    """Return what this rank of an engine really holds: pipeline coordinate, weights' and optimizer's bytes, elements."""
    engine = build(work, world_size)
    step(engine, work, 0)
    if uses_fsdp(work.parallel, engine.mesh.layout):
        weights = sum(p._local_tensor.untyped_storage().nbytes() for p in engine.module.parameters())  # type: ignore[attr-defined]
    else:
        weights = sum(weight.tensor.nbytes for weight in masters_of(engine).local.values())
    states = [value for state in engine.optimizer.state.values() for value in state.values() if value.dim()]
    elements = sum(fragment.box.numel for fragment in engine.fragments() if fragment.role == "weight")
    return engine.mesh.coordinates["pp"], weights, sum(value.untyped_storage().nbytes() for value in states), elements


def planned(work: Work, world_size: int) -> list[tuple[int, int | None, int]]:
    with torch.device("meta"):
        model = decoder(**work.llama())
    layout = Layout.plan(work.parallel, world_size)
    micro_batches = work.samples // layout.data_size // work.micro
    job = Job(SEQ_LEN, work.micro, micro_batches, "fp64", ["none"] * 4, compiled=False)
    make = lambda parameters, shards: torch.optim.AdamW([p.tensor for p in parameters])  # noqa: E731
    return [
        (r.weights, r.optimizer, r.elements)
        for r in layout_cost(model_inventory(model, work.parallel.tp), work.parallel, layout, job, tried_optimizer(make)).ranks
    ]


PLAIN = [
    ParallelConfig(zero=0),
    ParallelConfig(zero=1, replicate=2),
    ParallelConfig(zero=2, tp=2),
    ParallelConfig(zero=3, tp=4),
    ParallelConfig(zero=3, cp=2),
    ParallelConfig(zero=1, pp=2, tp=2, schedule="interleaved"),
]
PIPELINES = [ParallelConfig(zero=3, pp=2, schedule="interleaved"), ParallelConfig(zero=1, pp=2, tp=2)]
RECURRENT = {"count": 4, "top_k": 2, "ffn_dim": 8, "dense_layers": 1, "router": "recurrent", "state_dim": 6}
TIED = [ParallelConfig(zero=3), ParallelConfig(zero=3, pp=2), ParallelConfig(zero=1, pp=2, schedule="zbv")]


def test_masters_that_exist_only_during_an_update_are_counted_there() -> None:
    inventory, layout = decoder_inventory(ONE_B), Layout.plan(ParallelConfig(zero=1), 2)
    job = Job(1024, 1, 4, "bf16", ["none"] * 16, compiled=True)
    kinds = ("full", "bf16_kahan", "bf16_stochastic")
    for config, masters in ((AdamWConfig(), 0), (LionConfig(), 4)):  # AdamW's kernel needs none
        full, kahan, chance = (
            layout_cost(inventory, ParallelConfig(zero=1), layout, replace(job, masters=kind), optimizer_bytes(config)).ranks[0]
            for kind in kinds
        )
        assert (full.weights, kahan.weights, chance.weights) == (4 * full.elements, 2 * full.elements, 0)
        assert kahan.update == chance.update == full.update + masters * full.elements
        assert (chance.gathered, chance.held, chance.gradients) == (full.gathered, full.held, full.gradients)


@pytest.mark.parametrize(
    ("config", "alone", "shared"), [(MuonConfig(), 4, 4), (AdafactorConfig(), 8, 4), (AdamWConfig(), 0, 0)]
)
def test_updates_of_whole_matrices_are_held_at_once(config: OptimConfig, alone: int, shared: int) -> None:
    """Muon's in bf16, with its lookaheads. Others' in fp32, with gradients: of one rank these are bf16, and so are widened."""
    inventory, parallel = decoder_inventory(ONE_B), ParallelConfig(zero=1)
    hidden = sum(each.numel for each in inventory.parameters if each.hidden)
    for ranks, element in ((1, alone), (2, shared)):
        layout, job = Layout.plan(parallel, ranks), Job(1024, 1, 1, "bf16", ["none"] * 16, compiled=True)
        known, plain = (
            layout_cost(inventory, parallel, layout, job, optimizer_bytes(each)).ranks[0] for each in (config, AdamWConfig())
        )
        assert known.update - plain.update == element * hidden / ranks
        assert known.gradients == plain.gradients


def test_the_peak_is_that_of_a_pass_or_of_the_update() -> None:
    """Activations are free in the update. Of a long row they are more than what Muon's update holds, of a short one less."""
    inventory, parallel = decoder_inventory(ONE_B), ParallelConfig(zero=1)
    for seq_len, during in ((32768, False), (128, True)):
        job = Job(seq_len, 1, 1, "bf16", ["none"] * 16, compiled=True)
        (rank,) = layout_cost(inventory, parallel, Layout.plan(parallel, 1), job, optimizer_bytes(MuonConfig())).ranks
        passes = max(rank.activations + rank.working, rank.gradients + rank.late)
        assert (rank.update > passes) is during
        assert rank.total == rank.weights + rank.gathered + (rank.optimizer or 0) + max(passes, rank.update)
    layout = Layout.plan(parallel, 2)
    (rank,) = layout_cost(inventory, parallel, layout, job, optimizer_bytes(MuonConfig())).ranks
    assert rank.buffers > 0 and rank.total >= rank.weights + rank.gathered + (rank.optimizer or 0) + rank.update + rank.buffers


def test_a_host_that_updates_holds_sums_and_updates() -> None:
    """FSDP2 adds up on the host where it reduces every micro-batch; below ZeRO-2 a GPU has sums of whole gradients."""
    inventory, whole = decoder_inventory(ONE_B), 4 * parameter_count(ONE_B)
    for zero, held in ((3, 0), (2, 0), (1, whole)):
        parallel = ParallelConfig(zero=zero, offload="cpu")
        layout, job = Layout.plan(parallel, 2), Job(1024, 1, 4, "bf16", ["full"] * 16, compiled=True)
        hosts: list[int] = []
        for config in (LionConfig(), MuonConfig()):  # of one momentum each, but for what is no matrix
            rank = layout_cost(inventory, parallel, layout, job, optimizer_bytes(config)).ranks[0]
            found, away = engine_cost(rank, inventory, parallel, layout, job)
            hosts.append(away.host - (rank.optimizer or 0))
            assert (found.weights, found.held, found.update, found.optimizer) == (0, held, 0, 0)
        hidden = sum(each.numel for each in inventory.parameters if each.hidden)
        assert hosts[1] - hosts[0] == 4 * hidden / 2, "in bf16, with its lookaheads"


def all_held(rank: int, world_size: int, works: list[Work]) -> list[tuple[int, int, int, int]]:
    return [held(rank, world_size, work) for work in works]


@pytest.mark.parametrize(
    ("more", "layouts"), [(("tied", False), PLAIN), (("tied", True), TIED), (("experts", RECURRENT), PIPELINES)]
)
def test_shards_and_optimizer_state_are_counted_to_the_byte(more: tuple[str, Any], layouts: list[ParallelConfig]) -> None:
    works = [Work(parallel, samples=4, model=(("layers", 4), more, ("dim", 32))) for parallel in layouts]
    everything = run_ranks(4, all_held, works)
    for at, work in enumerate(works):
        expected = planned(work, 4)
        for pp in range(work.parallel.pp):
            found = [result[at][1:] for result in everything if result[at][0] == pp]
            assert max(found) == expected[pp], work.parallel


DEALT = [
    ParallelConfig(zero=3, ep=2),
    ParallelConfig(zero=1, ep=4),
    ParallelConfig(zero=3, tp=2, ep=2),
    ParallelConfig(zero=0, pp=2, ep=2),
]


def elements_held(rank: int, world_size: int, works: list[Work]) -> list[tuple[int, int, int]]:
    """Pipeline coordinate, elements that this rank updates, and of these those of experts."""
    found: list[tuple[int, int, int]] = []
    for work in works:
        engine = build(work, world_size)
        sizes = {each.name: each.box.numel for each in engine.fragments() if each.role == "weight"}
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        found.append((engine.mesh.coordinates["pp"], sum(sizes.values()), experts))
    return found


def test_experts_dealt_to_ranks_are_counted_apart() -> None:
    experts = {"count": 8, "top_k": 2, "ffn_dim": 8, "shared": 1, "dense_layers": 1}
    works = [Work(parallel, model=(("layers", 4), ("dim", 32), ("experts", experts))) for parallel in DEALT]
    everything = run_ranks(4, elements_held, works)
    for at, work in enumerate(works):
        with torch.device("meta"):
            inventory = model_inventory(decoder(**work.llama()), work.parallel.tp)
        layout, job = Layout.plan(work.parallel, 4), Job(SEQ_LEN, 1, 2, "bf16", ["none"] * 4, compiled=False)
        cost = layout_cost(inventory, work.parallel, layout, job, lambda *_: OptimizerNeeds(None))
        for pp, rank in enumerate(cost.ranks):
            found = [result[at][1:] for result in everything if result[at][0] == pp]
            assert max(found) == (rank.elements, rank.experts), work.parallel
            assert rank.experts == 8 * 3 * 8 * 32 * sum(layer > 0 for layers in rank.layers for layer in layers) // (
                layout.ep * layout.expert_weights
            )


def kept(model: Decoder, tokens: torch.Tensor) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, tokens)
    return sum(storage.nbytes() for storage in storages.values())


PARTS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen 3": {"qk_norm": "head", "head_dim": 24, "qkv_bias": True},
    "OLMo 3": {"qk_norm": "full", "norm_place": "after", "layer_types": ["sliding"], "sliding_window": 9},
    "DeepSeek-V3": {
        **{"attention": "mla", "kv_heads": 8},
        "mla": {"q_lora_rank": 40, "kv_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12},
    },
    "Gemma 2": {"norm_place": "around", "ffn_activation": "gelu_tanh", "attention_softcap": 5.0, "sinks": True},
}


@pytest.mark.parametrize(("parts", "policy"), [*((name, "none") for name in PARTS), ("Llama", "full"), ("Gemma 2", "full")])
def test_a_block_keeps_the_bytes_that_autograd_keeps(parts: str, policy: str) -> None:
    shape = {"dim": 128, "heads": 8, "kv_heads": 4, "ffn_dim": 352, "vocabulary": 500, **PARTS[parts]}
    models = [decoder(**shape, layers=layers) for layers in (2, 3)]
    tokens = torch.randint(0, 500, (2, 64))
    for model in models:
        apply_policies(list(model.layers.values()), [policy] * model.config.layers)
    per_block = kept(models[1], tokens) - kept(models[0], tokens)
    # On the CPU RMSNorm is made of simple operations, and keeps its normalised input too; the GPU's kernel does not.
    norms = [module for module in models[0].layers["0"].modules() if isinstance(module, Norm)]
    block = models[0].config.block(0)
    each_head = {"q_norm": 8, "k_norm": 4} if parts == "Qwen 3" else {}
    named = models[0].layers["0"].named_modules()
    norms = {name.rpartition(".")[2]: module for name, module in named if isinstance(module, Norm)}
    normed = sum(module.config.width * each_head.get(name, 1) for name, module in norms.items())
    on_cpu = tokens.numel() * normed * 4 if policy == "none" else 0
    assert per_block - on_cpu == block_bytes(block, ForwardPass(tokens.numel(), "fp32"), policy)


MIXTURE = {"dim": 128, "heads": 8, "kv_heads": 4, "ffn_dim": 352, "vocabulary": 500}
EXPERTS = {"count": 8, "top_k": 2, "ffn_dim": 64}
MIXTURES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "shared": {"shared": 1},
    "sigmoid": {"scores": "sigmoid"},
    "as scored": {"renormalise": False},
    "capacity": {"capacity": 1.25},
    "without gate": {"gated": False},
    "recurrent": {"router": "recurrent", "state_dim": 32},
    "ReLU": {"router": "relu"},
}


def training_pass(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Run a forward pass as a step does, with charges of experts."""
    layers, count = model.config.mixture_layers(), model.config.experts.count
    ledger = Ledger(list(layers), count, tokens.device, Rates())
    ledger.begin(torch.tensor(tokens.numel()), torch.ones(len(layers), count, dtype=torch.float64))
    return model(tokens, tokens, routing=Routing(ledger, torch.ones_like(tokens, dtype=torch.bool)))


def live_bytes(passes: Sequence[Callable[[], Any]]) -> list[int]:
    """Return the bytes that each pass leaves allocated, by PyTorch's own account. One profile costs less than many."""
    kept_alive: list[Any] = []
    gc.collect()
    gc.freeze()  # collections look at what the passes make alone
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for number, run in enumerate(passes):
            with record_function(f"pass {number}"):
                kept_alive.append(run())
                gc.collect()  # what cycles of references hold is no longer needed
    gc.unfreeze()
    # As the profiler recorded them: `profiler.events()` makes an object of each of 60,000 operations, for seconds.
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == MEMORY_EVENT_NAME]
    spans = {event.name(): (event.start_ns(), event.end_ns()) for event in events if event.name().startswith("pass ")}
    assert len(spans) == len(passes)
    return [
        sum(nbytes for at, nbytes in changes if begin <= at <= end)
        for begin, end in (spans[f"pass {number}"] for number in range(len(passes)))
    ]


def mixture_model(name: str, layers: Sequence[int], precision: str, fused: bool, policy: str) -> Decoder:
    """A model of two blocks, of which these have a mixture, with the kernels of experts or without."""
    model = decoder(**MIXTURE, layers=2, experts={**EXPERTS, **MIXTURES[name], "layers": list(layers)})
    model.to(torch.float32 if precision == "fp32" else torch.bfloat16)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    model.use_kernels(dict.fromkeys(range(2), BlockKernels(experts=FusedExperts() if fused else None)))
    apply_policies(list(model.layers.values()), [policy] * 2)
    return model


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_a_mixture_keeps_the_bytes_that_stay_allocated(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to the difference to a dense block at the same place, so that what norms keep on the CPU alone does not count."""
    tokens = torch.randint(0, 500, (4, 128))
    monkeypatch.setattr(FusedExperts, "fits", lambda *_: True)
    passes: list[Callable[[], Any]] = []
    expected: dict[tuple[str, str, bool], float] = {}
    mixed = [(name, fused) for name in ("softmax", "shared", "recurrent") for fused in (False, True)]
    for name, precision, fused in [*((name, "fp32", False) for name in MIXTURES), *((n, "bf16", fused) for n, fused in mixed)]:
        models = [mixture_model(name, layers, precision, fused, policy) for layers in ([0, 1], [1])]
        (mixture, dense), work = (model.config.block(0) for model in models), ForwardPass(tokens.numel(), precision)
        assert isinstance(mixture.ffn, MixtureConfig)
        assert mixture.ffn.can_fuse or not fused
        passes += [functools.partial(training_pass, model, tokens) for model in models]
        work = replace(work, fused_experts=fused)
        # Without a kernel of its own, a router also keeps its weights in fp32.
        widened = policy == "none" and precision == "bf16" and not (fused and name != "recurrent")
        weights = 4 * mixture.ffn.router_matrices * widened
        expected[name, precision, fused] = block_bytes(mixture, work, policy) - block_bytes(dense, work, policy) + weights
    sizes = live_bytes(passes)
    for (case, planned), more, fewer in zip(expected.items(), sizes[::2], sizes[1::2], strict=True):
        # Blocks also keep a few numbers for each expert: sums of what was routed, and where experts' rows end.
        assert more - fewer == pytest.approx(planned, abs=600), case


def test_of_kernels_that_may_be_used_the_larger_need_counts() -> None:
    experts = {"count": 8, "top_k": 2, "ffn_dim": 64}
    block = DecoderConfig.of({**MIXTURE, "layers": 1, "experts": experts}).block(0)
    for policy in ("none", "selective", "full", "offload"):
        both = [block_bytes(block, ForwardPass(128, "bf16", fused_experts=fused), policy) for fused in (False, True)]
        assert block_bytes(block, ForwardPass(128, "bf16"), policy) == max(both)
        plain = block_bytes(block, ForwardPass(128, "fp32", fused_experts=False), policy)
        assert block_bytes(block, ForwardPass(128, "fp32"), policy) == plain
        # A router of one's own may leave choices untaken, and then there are no kernels.
        own = {**experts, "parts": {"router": {"_target_": "mine.Router"}}}
        routed = DecoderConfig.of({**MIXTURE, "layers": 1, "experts": own}).block(0)
        assert block_bytes(routed, ForwardPass(128, "bf16", fused_experts=True), policy) >= max(both)


def rows_flops(rows: Sequence[int], weight: Sequence[int], bounds: Sequence[int]) -> int:
    """Count the FLOPs of each row times its expert's part of a weight that is stacked along its rows."""
    return 2 * rows[0] * (weight[0] // (bounds[0] - 1)) * weight[1]


def test_a_plan_knows_the_kernels_or_says_that_it_does_not() -> None:
    shape = DecoderConfig.of({**MIXTURE, "layers": 1, "experts": {**EXPERTS, "ffn_dim": 64}})
    job = Job(64, 1, 1, "bf16", ["none"], compiled=False)
    for fused in (None, False, True):
        assert with_kernels(job, shape, ParallelConfig(), fused=fused).fused_experts is fused
        assert with_kernels(job, shape, ParallelConfig(ep=2), fused=fused).fused_experts is False


KERNEL_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.meshloom.experts_up: lambda x, w1, w3, token, place, bounds, **_: 2 * rows_flops(token, w1, bounds),
    torch.ops.meshloom.experts_down: lambda hidden, both, w2, gates, token, place, bounds, **_: rows_flops(token, w2, bounds),
    torch.ops.meshloom.router_logits: lambda x, weight, **_: 2 * x[0] * x[1] * weight[0],
}
"""FLOPs of the kernels of experts, which PyTorch's counter does not know."""
AGAIN: list[tuple[str | None, bool, str]] = [
    *[(None, False, place) for place in ("before", "after")],
    *[(name, False, "before") for name in ("softmax", "shared", "without gate", "recurrent", "ReLU")],
    *[("softmax", True, "before"), ("shared", True, "before"), ("shared", True, "after"), ("recurrent", True, "before")],
]


@pytest.mark.parametrize(("name", "fused", "norms"), AGAIN)
def test_recomputed_flops_are_those_that_pytorch_counts(
    name: str | None, fused: bool, norms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 experts are a loop of products, which the counter knows."""
    monkeypatch.setattr(FusedExperts, "fits", lambda *_: True)
    tokens = torch.randint(0, 500, (2, 64))
    experts = {} if name is None else {"experts": {**EXPERTS, **MIXTURES[name]}}
    if name == "ReLU":
        experts["experts"]["top_k"] = 8  # of which about half are taken
    counted: dict[str, float] = {}
    for policy in ("none", "selective", "full"):
        model = decoder(**MIXTURE, **experts, layers=1, norm_place=norms).double()
        for number, weight in enumerate(model.parameters()):
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(number))
        model.use_kernels({0: BlockKernels(experts=FusedExperts() if fused else None)})
        apply_policies(list(model.layers.values()), [policy])
        with FlopCounterMode(display=False, custom_mapping=KERNEL_FLOPS) as counter:
            model(tokens, tokens).backward()
        counted[policy] = counter.get_total_flops() / tokens.numel()
    block = model.config.block(0)
    for policy in ("selective", "full"):
        again = recomputed_flops(block, policy, 0, fused_experts=fused)  # the counter does not know attention on a CPU
        if name == "ReLU":
            assert 0.2 * again < counted[policy] - counted["none"] < again
        else:
            assert counted[policy] - counted["none"] == pytest.approx(again), policy


def test_a_compiled_block_keeps_the_bytes_that_the_compiler_keeps() -> None:
    shape = {"dim": 128, "heads": 8, "kv_heads": 4, "ffn_dim": 352, "vocabulary": 500}
    models = [decoder(**shape, layers=layers).bfloat16() for layers in (2, 3)]
    tokens = torch.randint(0, 500, (2, 64))
    for model in models:
        for block in model.layers.values():
            block.compile(backend="aot_eager_decomp_partition")  # inductor's choice of what to keep, without its kernels
        kept(model, tokens)  # compiles
    work = ForwardPass(tokens.numel(), "bf16", compiled=True)
    assert kept(models[1], tokens) - kept(models[0], tokens) == block_bytes(models[0].config.block(0), work, "none")


def test_swiglu_inside_the_products_keeps_what_goes_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"dim": 128, "heads": 8, "kv_heads": 4, "ffn_dim": 352, "vocabulary": 500}
    models = [decoder(**shape, layers=layers).bfloat16() for layers in (2, 3)]
    tokens = torch.randint(0, 500, (2, 64))
    plain = kept(models[1], tokens) - kept(models[0], tokens)
    stand_in(monkeypatch)
    for model in models:
        for block in model.layers.values():
            assert isinstance(block, Block)
            block.ffn.swiglu = FusedSwiglu()
    works = [ForwardPass(tokens.numel(), "bf16", fused_swiglu=fused) for fused in (False, True)]
    less = plain - (kept(models[1], tokens) - kept(models[0], tokens))
    expected = [block_bytes(models[0].config.block(0), work, "none") for work in works]
    assert less == expected[0] - expected[1] == 2 * tokens.numel() * 352 * 2


def test_less_is_kept_from_policy_to_policy_and_by_cutting() -> None:
    block = ONE_B.block(0)
    work = ForwardPass(8192 * 4, "bf16")
    whole = [block_bytes(block, work, policy) for policy in ("none", "selective", "full", "offload")]
    assert whole == sorted(whole, reverse=True) and whole[-1] == 0
    assert block_bytes(block, replace(work, tokens=8192 * 2), "none") * 2 == whole[0]
    assert block_bytes(block, replace(work, tp=2), "none") < whole[0]
    assert block_bytes(block, replace(work, tp=2, sequence_parallel=True), "none") < block_bytes(
        block, replace(work, tp=2), "none"
    )
    assert block_bytes(block, replace(work, compiled=True), "none") < whole[0]


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as a sum of `parts` positive numbers, in order."""
    for cuts in itertools.combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in itertools.pairwise([0, *cuts, total]))


@given(
    st.sampled_from(["1f1b", "interleaved", "zbv"]),
    st.integers(1, 4),
    st.integers(1, 11),
    st.integers(0, 30),
    st.integers(0, 30),
)
@settings(deadline=None)
def test_costliest_rank_is_minimal_over_all_splits(schedule: str, pp: int, layers: int, first: int, last: int) -> None:
    ranks = stage_ranks(ParallelConfig(pp=pp, schedule=schedule))
    assume(len(ranks) <= layers)
    ends = [0] * len(ranks)
    ends[0] += first
    ends[-1] += last

    def dearest(counts: Sequence[int]) -> int:
        prices = [5 * count + end for count, end in zip(counts, ends, strict=True)]
        return max(sum(price for price, holder in zip(prices, ranks, strict=True) if holder == rank) for rank in ranks)

    split = stage_split(layers, 5, ends, ranks)
    assert [layer for part in split for layer in part] == list(range(layers)) and all(split)
    assert dearest([len(part) for part in split]) == min(map(dearest, compositions(layers, len(ranks))))


def test_the_head_makes_the_last_stage_shorter() -> None:
    parallel = ParallelConfig(pp=2)
    assert [len(layers) for layers in balanced_stages(ONE_B, parallel, 8192, ["none"] * 16).layers] == [10, 6]
    assert [len(layers) for layers in balanced_stages(ONE_B, parallel, 8192, ["full"] * 16).layers] == [9, 7]


def engine_stages(rank: int, world_size: int, budget: float) -> list[int]:
    """Layers of each stage of this rank, as the engine cuts them."""
    parallel = ParallelConfig(pp=2)
    mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"))
    with torch.device("meta"):
        model = decoder(**SHORT_AND_WIDE)
    settings = settings_of(model, parallel, budget=budget, precision="bf16", seq_len=64)
    engine = make_engine(model, mesh, lambda parameters, shards: AdamW(AdamWConfig(), parameters, shards), parallel, settings)
    return [len(engine.module.layers)]  # type: ignore[arg-type]


SHORT_AND_WIDE = {"dim": 16, "layers": 16, "heads": 2, "kv_heads": 1, "ffn_dim": 64, "vocabulary": 2600}


@pytest.mark.parametrize(("budget", "expected"), [(1.0, [12, 4]), (0.1, [11, 5])])
def test_plan_and_engine_cut_the_same_stages_under_a_budget(budget: float, expected: list[int]) -> None:
    """A budget of a tenth is kept by computing nearly everything again, which makes layers dearer, and the head less so."""
    chosen = ActivationSettings(budget=budget)
    with torch.device("meta"):
        model = decoder(**SHORT_AND_WIDE)
    parallel = ParallelConfig(pp=2)
    job = Job(64, 1, 2, "bf16", block_policies(model.config, parallel, chosen), False)
    optimizer = optimizer_bytes(AdamWConfig())
    assert optimizer is not None
    planned = layout_cost(model_inventory(model, 1), parallel, Layout.plan(parallel, 2), job, optimizer)
    assert [len(layers) for layers in planned.plan.layers] == expected
    assert [count for counts in run_ranks(2, engine_stages, budget) for count in counts] == expected


def test_a_budget_that_selective_keeps_to_computes_no_more_again() -> None:
    """Compiled, a block of Llama 1B keeps 75,912 bytes a token, selectively 34,944: 0.46 of it, and not 0.68."""
    chosen = ActivationSettings(budget=0.5, compile=True)
    assert block_policies(replace(ONE_B, layers=4), ParallelConfig(), chosen) == ["selective"] * 4


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)])
@pytest.mark.parametrize(("pp", "count"), [(2, 2), (2, 6), (4, 4), (4, 8), (3, 9), (8, 32)])
def test_bubbles_have_their_closed_form(schedule: str, chunks: int, pp: int, count: int) -> None:
    """(p − 1) / (v·m + p − 1) of wall time (Narayanan et al., arXiv 2104.04473)."""
    parallel = ParallelConfig(pp=pp, schedule=schedule, stages_per_rank=chunks if chunks > 1 else None)
    timeline = simulate(pipeline_order(parallel, count), [Costs(1.0, 1.0, 1.0)] * (pp * chunks))
    assert timeline.bubble == pytest.approx((pp - 1) / (chunks * count + pp - 1))


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_schedules_keep_and_lose_as_much_as_published(pp: int) -> None:
    def timeline(schedule: str) -> Timeline:
        parallel = ParallelConfig(pp=pp, schedule=schedule)
        return simulate(pipeline_order(parallel, 2 * pp), [Costs(1.0, 1.0, 1.0)] * stage_count(parallel))

    def peaks(schedule: str) -> list[float]:
        return [peak([span.action for span in row], lambda _stage: 1.0) for row in timeline(schedule).spans]

    assert peaks("gpipe") == [2 * pp] * pp
    assert peaks("1f1b") == [pp - rank for rank in range(pp)]
    # Zero bubble, ZB-V: all ranks hold alike, as much as 1F1B's first (arXiv 2401.10241, section 6), and wait less.
    assert peaks("zbv") == [2 * pp] * pp
    for schedule in ("zb", "zbv", "dualpipev"):
        assert timeline(schedule).bubble < timeline("interleaved").bubble


@given(st.sampled_from([*SCHEDULES]), st.integers(2, 4), st.integers(1, 3))
@settings(deadline=None)
def test_every_action_runs_once_and_not_before_its_input(schedule: str, pp: int, times: int) -> None:
    parallel = ParallelConfig(pp=pp, schedule=schedule)
    count = Assigner(1, functools.partial(legal_micro_batches, parallel)).passes(times * pp, 1)
    timeline = simulate(pipeline_order(parallel, count), [Costs(1.0, 1.5, 0.5)] * stage_count(parallel), hop=0.25)
    ends = {(s.action.kind, s.action.stage, s.action.micro): s.end for row in timeline.spans for s in row}
    for stage, micro in itertools.product(range(stage_count(parallel)), range(count)):
        whole, halves = ("B", stage, micro) in ends, ("I", stage, micro) in ends and ("W", stage, micro) in ends
        assert whole != halves and ("F", stage, micro) in ends
    assert len(ends) == sum(len(row) for row in timeline.spans), "nothing twice"
    for row in timeline.spans:
        for before, after in itertools.pairwise(row):
            assert after.start >= before.end
        for span in row:
            if span.action.kind == "F" and span.action.stage:
                assert span.start >= ends["F", span.action.stage - 1, span.action.micro]


@pytest.mark.parametrize(("seq_len", "micro", "gib"), [(4096, 1, 36.40), (8192, 2, 45.26), (2048, 4, 39.99)])
def test_the_peak_is_that_of_an_h200(seq_len: int, micro: int, gib: float) -> None:
    """Rows of `benchmarks/planner/rows_h200.json`. In the first one all gradients are larger than the activations, and the
    loss's memory is free by then.
    """
    shape = decoder_inventory(
        DecoderConfig(vocabulary=128_256, dim=4096, layers=6, heads=32, kv_heads=8, ffn_dim=14336, tied=False)
    )
    job = Job(seq_len, micro, 1, "bf16", ["none"] * 6, True, fused=True)
    optimizer = optimizer_bytes(AdamWConfig())
    assert optimizer is not None
    (rank,) = layout_cost(shape, ParallelConfig(zero=1), Layout(), job, optimizer).ranks
    assert rank.total / 2**30 == pytest.approx(gib, rel=0.005)
