"""Bytes that an update moves in memory, beside those of the arrays that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshloom.config.nodes import import_object
from meshloom.kernels.random_bits import BoxIndex
from meshloom.kernels.rounding import KeptWeight
from meshloom.models.config import DecoderConfig
from meshloom.optim.optimizers.config import (
    AdaGradConfig,
    AdaGradNormConfig,
    AdamWConfig,
    AdEMAMixConfig,
    LAMBConfig,
    LARSConfig,
    LionConfig,
    OptimConfig,
    ScheduleFreeConfig,
)
from meshloom.optim.optimizers.eight_bit import quantize
from meshloom.optim.optimizers.eight_bit_config import AdamW8bitConfig
from meshloom.optim.optimizers.frugal_config import FRUGALConfig
from meshloom.optim.optimizers.matrix_config import MuonConfig
from meshloom.optim.optimizers.parameters import NamedParameter, Unsharded
from meshloom.optim.optimizers.update_passes import FUSED_ADAMW, update_passes
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import Layout
from meshloom.planner.cost import layout_cost
from meshloom.planner.memory import Job, optimizer_bytes
from meshloom.planner.parameters import decoder_inventory
from meshloom.planner.traffic import torch_moved

ONE_B = decoder_inventory(DecoderConfig(dim=2048, layers=16, heads=32, kv_heads=8, ffn_dim=8192, vocabulary=128256))


def update_of_an_element(
    config: OptimConfig, masters: str = "full", *, ranks: int = 1, many: int = 1, parallel: ParallelConfig | None = None
) -> float:
    """Bytes that an update moves for an element of Llama 1B in bf16, by the plan, with masters that are made for it."""
    parallel = parallel or ParallelConfig(zero=1)
    layout, job = Layout.plan(parallel, ranks), Job(8192, 1, many, "bf16", ["none"] * 16, compiled=True, masters=masters)
    optimizer = optimizer_bytes(config)
    assert optimizer is not None
    (rank,) = layout_cost(ONE_B, parallel, layout, job, optimizer).ranks
    moved, full = (torch_moved(rank, parallel, layout, each) for each in (job, replace(job, masters="full")))
    return (moved.update + moved.within - full.within) / rank.elements


def test_an_update_moves_what_its_kernel_is_given() -> None:
    """`kernels/triton_adamw.py` and `triton_eight_bit.py`; the gradient is read for its norm, too."""
    shape = (16, 512)
    master, moment, wide = (torch.zeros(shape) for _ in range(3))
    copy, narrow, remainder = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(3))
    box = BoxIndex.of(shape, shape, (0, 0))
    assert box is not None
    eight_bits = sum(each.nbytes for each in quantize(moment, torch.linspace(-1, 1, 256), 256))
    for config, state in ((AdamWConfig(), moment.nbytes), (AdamW8bitConfig(), eight_bits)):
        for many, gradient in ((1, narrow), (4, wide)):
            always = 2 * 2 * state + 2 * gradient.nbytes
            expected = {"full": always + 2 * master.nbytes + copy.nbytes}
            for kind, left in (("bf16_stochastic", None), ("bf16_kahan", remainder)):
                kept = KeptWeight(copy, left, 0, box)
                expected[kind] = always + 2 * (kept.value.nbytes + (0 if kept.remainder is None else kept.remainder.nbytes))
            for masters, size in expected.items():
                found = update_of_an_element(config, masters, many=many)
                assert found == pytest.approx(size / master.numel(), rel=1e-3), (config.name, masters, many)
    assert update_of_an_element(AdamWConfig(), ranks=2) == 34, "what ranks have sent is added up in fp32"
    fully = {"ranks": 2, "parallel": ParallelConfig(zero=3)}
    assert update_of_an_element(AdamWConfig(), **fully) == 32, "FSDP2 has no copy"  # type: ignore[arg-type]
    assert update_of_an_element(MuonConfig()) == 30, "AdamW of what is no matrix of a block"


def test_without_a_kernel_of_its_own_masters_are_made_and_rounded() -> None:
    """Of Lion: the gradient is widened, read for its norm and scaled, then there are thirteen arrays, then what is kept."""
    common, rounded = 6 + 4 + 8 + 13 * 4, {"full": 6, "bf16_stochastic": 12, "bf16_kahan": 24}
    for kind, last in rounded.items():
        assert update_of_an_element(LionConfig(), kind) == common + last
        assert update_of_an_element(MuonConfig(), kind) == 30 + (0 if kind == "full" else last - 2)
    assert update_of_an_element(AdamWConfig(fused=False)) == common + 6 + (21 - 13) * 4
    host = update_of_an_element(AdamWConfig(), ranks=2, parallel=ParallelConfig(zero=3, offload="cpu"))
    assert host == 4 + 8 + 28, "torch's own kernel does not clip"


class Moved(TorchDispatchMode):
    """Counts the bytes of arrays that operations read and write. Views move nothing."""

    def __init__(self, least: int) -> None:
        """least: elements of the smallest array that counts."""
        super().__init__()
        self.bytes, self._least = 0, least

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count."""
        result, schema = func(*args, **(kwargs or {})), func._schema
        written = [
            arg for arg, said in zip(args, schema.arguments, strict=False) if said.alias_info and said.alias_info.is_write
        ]
        if not any(each.alias_info and not each.alias_info.is_write for each in schema.returns):
            self.bytes += self._size((args, kwargs)) + self._size(result if schema.returns else written)
        return result

    def _size(self, values: Any) -> int:
        tensors = (each for each in tree_leaves(values) if isinstance(each, torch.Tensor))
        return sum(each.nbytes for each in tensors if each.numel() >= self._least)


@pytest.mark.parametrize(
    "make",
    [
        *(LAMBConfig, LARSConfig, LionConfig, AdEMAMixConfig, ScheduleFreeConfig, AdaGradConfig, AdaGradNormConfig),
        *(AdamW8bitConfig, FRUGALConfig),
    ],
)
def test_passes_of_an_update_are_those_of_its_operations(make: Callable[[], OptimConfig]) -> None:
    config, shape = make(), (64, 1024)
    configs = [config] if not isinstance(config, FRUGALConfig) else [replace(config, period=period) for period in (1, 4)]
    for each in configs:
        weight = torch.nn.Parameter(torch.randn(shape))
        optimizer = import_object(each._target_)(
            each, [NamedParameter("layers.0.w", weight, shape, True, 1.0, hidden=True)], Unsharded()
        )
        for _ in range(2):
            weight.grad = torch.randn(shape)
            optimizer.step()
        weight.grad = torch.randn(shape)
        with Moved(weight.numel() // 8) as moved:
            optimizer.step()
        assert moved.bytes / weight.nbytes == pytest.approx(update_passes(each), rel=0.02)


def test_passes_of_adamw_are_those_of_its_operations() -> None:
    assert update_passes(AdamWConfig()) == FUSED_ADAMW == 4 + 3
    weight = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = torch.optim.AdamW([weight], foreach=True)
    for counts in (Moved(0), Moved(weight.numel())):
        weight.grad = torch.randn(64, 64)
        with counts:
            optimizer.step()
    assert counts.bytes / weight.nbytes == update_passes(AdamWConfig(fused=False))
