"""ZeRO++'s quantised weights (qwZ) under the DeepSpeed engine: the wire is lossy, the masters and their checkpoints are not.

DeepSpeed's quantiser is a CUDA kernel. Here its formula stands in its place (symmetric int8 by groups, through fp16, as
csrc/quantization has it), and DeepSpeed's own gathering around it runs as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")

import deepspeed
import deepspeed.ops.op_builder
import deepspeed.runtime.zero.stage3  # here, so that the ranks need not

from meshloom.config.problems import ConfigError
from meshloom.models.init import fill
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.deepspeed.optimizer import require_op
from meshloom.parallel.deepspeed.setup import import_deepspeed
from support.deepspeed_runs import leg, whole, zeros
from support.models import decoder
from support.parity import IGNORED, MicroBatch, Work, curves, plain_curve, sample
from support.ranks import run_ranks

EVEN = (("dim", 32), ("ffn_dim", 64), ("vocabulary", 64))  # every shard comes in eights
KEY = "parallel.deepspeed.config.zero_optimization.zero_quantized_weights"


class Kernel:
    """The formula of DeepSpeed's quantiser, and how many weights came through it."""

    Symmetric = 0
    weights = 0

    @classmethod
    def quantize(cls, values: torch.Tensor, groups: int, bits: int, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert values.dtype == torch.half and bits == 8, "the kernel takes everything for fp16"
        cls.weights += values.numel()
        rows = values.float().view(groups, -1)
        scales = rows.abs().amax(1, keepdim=True) * 2 / 256
        levels = torch.where(scales > 0, rows / scales, 0).round().clamp(-128, 127)
        return levels.to(torch.int8).view(values.shape), scales.flatten()

    @classmethod
    def dequantize(cls, levels: torch.Tensor, scales: torch.Tensor, groups: int, bits: int, kind: int) -> torch.Tensor:
        return (levels.float().view(groups, -1) * scales[:, None]).half().view(levels.shape)


class Builder:
    """Stand in for what builds the kernel."""

    def is_compatible(self, verbose: bool = True) -> bool:
        return True

    def load(self, verbose: bool = True) -> type[Kernel]:
        return Kernel


@contextmanager
def kernel() -> Iterator[None]:
    before = deepspeed.ops.op_builder.QuantizerBuilder
    deepspeed.ops.op_builder.QuantizerBuilder = Builder
    try:
        yield
    finally:
        deepspeed.ops.op_builder.QuantizerBuilder = before


def quantised(**keys: Any) -> ParallelConfig:
    """Every weight is gathered, small ones too."""
    return zeros(3, zero_quantized_weights=True, stage3_param_persistence_threshold=0, **keys)


def trained(rank: int, world_size: int, work: Work) -> tuple[list[float], list[float], int]:
    with kernel():
        return *curves(rank, world_size, work), Kernel.weights


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("ranks", "keys"), [(2, {}), (4, {"zero_hpz_partition_size": 2}), (2, {"stage3_allgather_sequential": True})]
)
def test_losses_stay_near_those_of_the_bare_loop(ranks: int, keys: dict[str, Any], precision: str) -> None:
    work = Work(quantised(**keys), precision=precision, steps=5, model=EVEN)
    losses, norms = plain_curve(work)
    results = run_ranks(ranks, trained, work)
    assert all(result == results[0] for result in results)
    found_losses, found_norms, weights = results[0]
    assert weights > 5 * 10_000
    assert found_losses == pytest.approx(losses, rel=1e-2)
    assert found_norms == pytest.approx(norms, rel=0.2)
    assert found_losses != pytest.approx(losses, rel=1e-6), "nothing was quantised"


def test_first_step_equals_the_model_on_quantised_weights() -> None:
    """Gathered one by one, a weight is its two halves, each quantised as one group: the bare model can be given just that."""
    work = Work(quantised(stage3_allgather_sequential=True), precision="fp32", steps=1, model=EVEN)
    model = decoder(**work.llama())
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        fill(parameter.data, model.initial(name), seed=7, name=name, global_shape=shape, offsets=(0,) * len(shape))
        halves = [
            Kernel.dequantize(*Kernel.quantize(half.half(), 1, 8, 0), 1, 8, 0) for half in parameter.data.flatten().chunk(2)
        ]
        parameter.data = torch.cat(halves).float().view(shape)
    batch = MicroBatch.collate([sample(index) for index in range(work.samples)])
    logits = model(batch.tokens_BS, None, batch.documents)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten(), ignore_index=IGNORED)
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]).norm()
    (found_loss,), (found_norm,), _ = run_ranks(2, trained, work)[0]
    # DeepSpeed gathers differently in a rank's very first pass: 6e-5 of that micro-batch's loss; all others agree to the bit.
    assert found_loss == pytest.approx(loss.item(), rel=3e-5)
    assert found_norm == pytest.approx(norm.item(), rel=1e-4)


def part(rank: int, world_size: int, work: Work, arrays: Any, counters: dict[str, float]) -> Any:
    with kernel():
        return leg(rank, world_size, work, arrays, counters)


def test_masters_are_not_quantised_and_a_run_goes_on_from_them() -> None:
    """The curve goes on within the wire's noise: before DeepSpeed has seen in which order weights are used, it gathers some
    of them otherwise.
    """
    work = Work(quantised(), precision="bf16", micro=2, steps=2, model=EVEN)
    exact = replace(work, parallel=zeros(3))
    first = run_ranks(2, part, work, None, {})
    start = whole([result[0] for result in run_ranks(2, leg, exact, None, {})])
    assert all(torch.equal(array, start[key]) for key, array in whole([result[0] for result in first]).items())
    arrays, counters = whole([result[1] for result in first]), first[0][2]
    resumed = run_ranks(2, part, replace(work, first_step=2), arrays, counters)
    arrived = whole([result[0] for result in resumed])
    assert arrived.keys() == arrays.keys() and all(torch.equal(arrived[key], arrays[key]) for key in arrays)
    straight = run_ranks(2, part, replace(work, steps=4), None, {})
    assert first[0][3] + resumed[0][3] == pytest.approx(straight[0][3], rel=1e-3)


def refused(rank: int, world_size: int, work: Work) -> str:
    with kernel(), pytest.raises(ConfigError) as caught:
        curves(rank, world_size, work)
    return str(caught.value)


def test_weights_whose_shards_do_not_come_in_eights_are_named() -> None:
    """DeepSpeed would stop at an assertion within a step, or unpack a padded weight with other groups' scales."""
    shape = (("dim", 24), ("ffn_dim", 64), ("vocabulary", 61))
    for said in run_ranks(2, refused, Work(quantised(), precision="fp32", steps=1, model=shape)):
        assert f"{KEY}: DeepSpeed quantises" in said
        assert "2 ranks don't have of embed" in said and "w1" not in said


def test_without_a_gpu_it_says_what_is_needed() -> None:
    import_deepspeed("cpu")
    with pytest.raises(
        ConfigError, match=r"QuantizerBuilder can't be built \(.*not been implemented on CPU.*a GPU, CUDA's toolkit"
    ):
        require_op("QuantizerBuilder", KEY, "leave it out")


@pytest.mark.parametrize(
    ("builder", "needs"),
    [("QuantizerBuilder", "nvcc"), ("AsyncIOBuilder", "libaio"), ("CPUAdamBuilder", "g++")],
)
@pytest.mark.parametrize("fails_in", ["is_compatible", "load"])
def test_a_part_that_cannot_be_built_is_named_with_what_it_needs(
    builder: str, needs: str, fails_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Builder):
        def is_compatible(self, verbose: bool = True) -> bool:
            return fails_in != "is_compatible"

        def load(self, verbose: bool = True) -> type[Kernel]:
            raise RuntimeError("ninja: not found\nand a long log")

    monkeypatch.setattr(deepspeed.ops.op_builder, builder, Broken)
    cause = "ninja: not found" if fails_in == "load" else "incompatible with this machine"
    with pytest.raises(
        ConfigError, match=rf"the\.key: .*{builder} can't be built \(.*{cause}\); it needs .*{re.escape(needs)}.*do without"
    ) as caught:
        require_op(builder, "the.key", "do without")
    assert "long log" not in str(caught.value)


def test_the_kernels_take_everything_for_fp16() -> None:
    """The reason to refuse quantised gradients, which are fp32 here, and for DeepSpeed's cast of weights."""
    source = Path(deepspeed.__file__).parent / "ops/csrc/quantization/pt_binding.cpp"
    assert source.read_text().count("(__half*)input_vals.data_ptr()") == 2
