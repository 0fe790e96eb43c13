"""Activation policies change no number, keep activations where they should, and survive compilation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch._dynamo.testing import CompileCounter

from meshloom.data.batch import MicroBatch
from meshloom.models.decoder import Decoder
from meshloom.models.mixture import grouped
from meshloom.parallel import on_host
from meshloom.parallel.activation import apply_policies
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import StepLoss
from meshloom.parallel.policies import MIXED, POLICIES, mixed_policies
from meshloom.parallel.torch.engine import TorchEngine
from support.compiling import counted_graphs
from support.models import decoder
from support.parity import Run, Work, differences, runs

EVALUATE = TorchEngine.evaluate
TOKENS = torch.arange(128).view(2, 64) * 7 % 100


def gradients(policies: list[str], compiled: bool = False) -> tuple[Decoder, torch.Tensor]:
    torch.manual_seed(0)
    model = decoder(dim=64, layers=len(policies), heads=4, kv_heads=2, ffn_dim=96, vocabulary=100).double()
    apply_policies(list(model.layers.values()), policies, compiled=compiled)
    model(TOKENS, TOKENS).backward()
    return model, torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_the_same_and_every_block_is_compiled(
    policy: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_host, "SMALL", 0)
    counter, compile_function = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_function(function, backend=counter))
    _, expected = gradients(["none", "none"])
    torch._dynamo.reset()
    _, found = gradients([policy, policy], compiled)
    assert torch.equal(found, expected)
    assert (counter.frame_count > 0) == compiled


def test_activations_are_offloaded_once_and_weights_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_host, "SMALL", 0)
    copied: list[torch.Tensor] = []
    plain_copy = torch.Tensor.copy_

    def copy(host: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copied.append(source)
        return plain_copy(host, source, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    model, _ = gradients(["offload"])
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    assert copied and not any(tensor.untyped_storage().data_ptr() in weights for tensor in copied)
    views = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in copied]
    assert len(set(views)) == len(views), "the input of three projections is copied once"


@given(st.integers(1, 12), st.floats(0.05, 1.0), st.integers(5, 60), st.integers(1, 4))
@settings(deadline=None)
def test_a_budget_is_kept_and_little_is_computed_again(layers: int, budget: float, selective: int, full: int) -> None:
    kept = {"none": 100.0, "selective": float(selective), "full": float(full)}
    again = {"none": 0.0, "selective": 0.1, "full": 1.0}
    options = [
        mix
        for mix in itertools.combinations_with_replacement(MIXED, layers)
        if sum(kept[policy] for policy in mix) <= budget * layers * 100 + 1e-6
    ]
    assert options, "policy full alone keeps to every budget here"
    found = mixed_policies(layers, budget, kept, again)
    assert sum(kept[policy] for policy in found) <= budget * layers * 100 + 1e-6
    least = min(sum(again[policy] for policy in mix) for mix in options)
    assert sum(again[policy] for policy in found) == pytest.approx(least)


def test_a_budget_is_spread_over_the_layers_and_may_be_too_small() -> None:
    kept = {"none": 10.0, "selective": 5.0, "full": 1.0}
    again = {"none": 0.0, "selective": 0.3, "full": 1.0}
    assert mixed_policies(4, 1.0, kept, again) == ["none"] * 4
    assert mixed_policies(4, 0.75, kept, again) == ["none", "selective"] * 2
    assert mixed_policies(4, 0.3, kept, again) == ["selective", "full"] * 2
    assert mixed_policies(2, 0.6, {"none": 10.0, "full": 1.0}, again) == ["none", "full"]
    with pytest.raises(ValueError, match=r"can't keep 0.05 of what they would; policy 'full' keeps 0.100"):
        mixed_policies(4, 0.05, kept, again)


def compiled_runs(rank: int, world_size: int, works: Sequence[Work]) -> list[Run]:
    """Traced and differentiated as for a GPU; only the code that comes out of it is not generated, to save time.

    Evaluations, which are traced once more, are compiled in the first two of the runs alone: with whole weights, and with
    weights that tensor parallelism cuts. The loop over experts is not: it is a graph for each number of rows, and
    `test_mixture.py` compiles it by itself.
    """
    found: list[Run] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "loop_product", torch.compiler.disable(grouped.loop_product))
        for number, work in enumerate(works):
            if number == 2:
                patch.setattr(TorchEngine, "evaluate", evaluate_uncompiled)
            with counted_graphs() as counter:
                found += runs(rank, world_size, [work])
            assert counter.frame_count > 0, work
    return found


def evaluate_uncompiled(engine: TorchEngine, micro_batches: Sequence[MicroBatch]) -> StepLoss:
    with torch.compiler.set_stance("force_eager"):
        return EVALUATE(engine, micro_batches)


def test_compiled_blocks_train_the_same_on_every_layout() -> None:
    one, layers = (("layers", 1),), (("layers", 4),)  # each block is traced by itself, which takes most of the time
    works = [
        Work(ParallelConfig(zero=3), 2, activation="selective"),
        Work(ParallelConfig(tp=2), 2, model=one),
        Work(ParallelConfig(tp=2, sequence_parallel=False), 2, activation="selective", model=one),
        Work(ParallelConfig(cp=2), 4, documents=True, activation="full", model=one),
        Work(ParallelConfig(cp=2, cp_kind="ulysses"), 4, model=one),
        Work(ParallelConfig(pp=2, schedule="interleaved"), 2, activation="offload", model=layers),
        Work(ParallelConfig(ep=2), 4, activation="full", model=(("layers", 1), ("experts", {"count": 4, "ffn_dim": 7}))),
    ]
    works = [dataclasses.replace(work, compile=True, steps=2) for work in works]
    for work, found in zip(works, differences(2, works, timeout=300.0, body=compiled_runs), strict=True):
        assert found.worst < 1e-9, (work, found)
