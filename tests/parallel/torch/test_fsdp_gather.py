"""Weights cast once on their way out train as with FSDP2's own cast and copy: the same bits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from meshloom.kernels.rows import pack, sum_rows
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.torch import fsdp_gather, fully_sharded
from meshloom.parallel.torch.engine import TorchEngine
from meshloom.parallel.torch.fsdp_gather import fsdp_parameters
from support.parity import Work, share, train
from support.ranks import run_ranks

LAYOUTS = {
    2: {
        "ZeRO-2": ParallelConfig(zero=2),
        "ZeRO-3": ParallelConfig(zero=3),
        "CPU offload": ParallelConfig(zero=3, offload="cpu"),
    },
    4: {
        "HSDP": ParallelConfig(zero=3, replicate=2),
        "tensor parallelism": ParallelConfig(zero=3, tp=2),
        "pipeline": ParallelConfig(zero=3, pp=2, schedule="zb"),
    },
}

Found = tuple[list[float], list[float], float, dict[str, torch.Tensor], int]


def of_works(rank: int, world_size: int, works: Sequence[tuple[Work, bool]]) -> list[Found]:
    """Losses, norms, the loss of an evaluation, whole weights, and how often ours wrote shards to where they are sent from.

    Each with FSDP2's own cast (True) or ours.
    """
    found: list[Found] = []
    ours, asked = fsdp_gather.pack, fully_sharded.can_set_gather_dtype
    packed: list[int] = []

    def counted(places: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        packed.append(len(places))
        ours(places, sources)

    fsdp_gather.pack = counted
    for work, own in works:
        fully_sharded.can_set_gather_dtype = (lambda *_: False) if own else asked
        packed.clear()
        engine, losses, norms = train(work, world_size)
        assert isinstance(engine, TorchEngine)
        held_out = float(engine.evaluate(share(engine.mesh, work, 10_000).micro_batches).mean)
        weights: dict[str, torch.Tensor] = {}
        for name, module in engine.module.named_modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                for number, record in enumerate(fsdp_parameters(module)):
                    weights[f"{name} {number}"] = record.unsharded_param.detach().clone()
                module.reshard()
        found.append((losses, norms, held_out, weights, len(packed)))
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_weights_and_losses_are_bit_equal_to_fsdps_own_cast(ranks: int) -> None:
    works = [
        Work(layout, micro=1 if layout.pp > 1 else 2, steps=2, precision="bf16", model=(("layers", 2 * layout.pp),))
        for layout in LAYOUTS[ranks].values()
    ]
    for each in run_ranks(ranks, of_works, [(work, own) for work in works for own in (False, True)]):
        for layout, ours, theirs in zip(LAYOUTS[ranks], each[::2], each[1::2], strict=True):
            assert ours[:3] == theirs[:3], layout
            assert len(set(ours[0])) == 2, "the weights change"
            assert ours[3].keys() == theirs[3].keys()
            for name, weight in ours[3].items():
                assert weight.dtype == theirs[3][name].dtype == torch.bfloat16, name
                assert torch.equal(whole(weight), whole(theirs[3][name])), f"{layout}: {name}"
            assert ours[4] > 0 == theirs[4], layout


CHANGES = ("another rule", "another name", "none")


def of_changed_fsdps(rank: int, world_size: int) -> list[tuple[bool, list[str], list[float]]]:
    """Return the findings of `of_a_changed_fsdp` after each change."""
    found: list[tuple[bool, list[str], list[float]]] = []
    for change in CHANGES:
        with pytest.MonkeyPatch.context() as patch:
            found.append(of_a_changed_fsdp(world_size, change, patch))
    return found


def of_a_changed_fsdp(world_size: int, change: str, patch: pytest.MonkeyPatch) -> tuple[bool, list[str], list[float]]:
    """Losses where FSDP2 is not as we know it: whether our cast was used, and what was said about it."""
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    patch.setattr(fsdp_gather.log, "handlers", [Kept()])
    fsdp_gather.log.setLevel(logging.DEBUG)

    def always_makes_some(self: Any, numels: list[int], dtypes: list[torch.dtype], ways: int, device: torch.device) -> None:
        self.all_gather_outputs = [torch.empty(numels[0] * ways, dtype=dtypes[0], device=device)]

    known: Any = FSDPParam.init_all_gather_outputs
    if change == "another rule":
        FSDPParam.init_all_gather_outputs = always_makes_some  # type: ignore[method-assign]
    elif change == "another name":
        del FSDPParam.init_all_gather_outputs
    used = fully_sharded.can_set_gather_dtype(
        torch.bfloat16, {"mesh": torch.distributed.init_device_mesh("cpu", (world_size,))}
    )
    FSDPParam.init_all_gather_outputs = known  # type: ignore[method-assign]
    if not used:
        patch.setattr(fully_sharded, "can_set_gather_dtype", lambda *_: False)
    _, losses, _ = train(Work(ParallelConfig(zero=3), micro=1, steps=2, precision="bf16"), world_size)
    return used, said, losses


def test_an_fsdp_that_has_changed_casts_in_its_own_way() -> None:
    (*changed, (used, said, expected)), _ = run_ranks(2, of_changed_fsdps)
    assert used and not said
    for change, (used, said, losses) in zip(CHANGES, changed, strict=False):
        assert not used and len(said) == 1 and said[0].startswith("FSDP2 casts weights in a pass of its own"), change
        assert losses == expected, change


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_rows_are_widened_before_they_are_added(count: int) -> None:
    rows = torch.randn(count, 97, generator=torch.Generator().manual_seed(count)).bfloat16()
    for dtype in (torch.float32, torch.float64):
        expected = sum(rows[number].to(dtype) for number in range(count))
        torch.testing.assert_close(sum_rows(rows, dtype), expected)
        out = torch.full((97,), torch.nan, dtype=dtype)
        assert sum_rows(rows, dtype, out=out) is out
        torch.testing.assert_close(out, expected)


def test_each_source_is_written_to_its_place() -> None:
    sources = [torch.randn(5), torch.randn(0), torch.randn(3).bfloat16()]
    whole = torch.zeros(10, dtype=torch.bfloat16)
    pack(whole[1:9].split([5, 0, 3]), sources)
    assert torch.equal(whole[1:9], torch.cat([source.bfloat16() for source in sources]))
    assert whole[0] == whole[9] == 0
