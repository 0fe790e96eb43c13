"""Kernels that add up rows and cast weights into their places, against PyTorch's plain form, bit by bit."""

from __future__ import annotations

import pytest
import torch

from meshloom.kernels.rows import pack, sum_rows

pytestmark = pytest.mark.gpu

GIB = 2**30


def in_order(rows: torch.Tensor) -> torch.Tensor:
    """Add up what ranks 0, 1, 2, … sent, in fp32 in this order."""
    total = rows[0].to(torch.float32, copy=True)
    for row in rows[1:]:
        total += row
    return total


@pytest.mark.parametrize("size", [1, 1000, 4096, 2**20 + 3])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_added_up_in_their_order(dtype: torch.dtype, count: int, size: int) -> None:
    torch.manual_seed(count)
    rows = (torch.randn(count, size, device="cuda") * torch.logspace(-2, 2, count, device="cuda")[:, None]).to(dtype)
    found = torch.full((size + 2,), torch.nan, device="cuda")
    assert sum_rows(rows, torch.float32, out=found[1:-1]).data_ptr() == found[1:-1].data_ptr()
    assert torch.equal(found[1:-1], in_order(rows))
    assert found[0].isnan() and found[-1].isnan(), "nothing is written beyond a row"
    assert torch.equal(sum_rows(rows, torch.float32), found[1:-1])
    torch.testing.assert_close(found[1:-1], rows.sum(0, dtype=torch.float32), rtol=1e-5, atol=1e-4)


def test_doubles_and_nothing_are_summed_too() -> None:
    rows = torch.randn(3, 50, device="cuda", dtype=torch.float64)
    assert torch.equal(sum_rows(rows, torch.float64), rows.sum(0))
    assert sum_rows(torch.empty(2, 0, device="cuda", dtype=torch.bfloat16), torch.float32).shape == (0,)


def test_sources_are_rounded_as_pytorch_does() -> None:
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (2**20,), device="cuda", dtype=torch.int32)  # every kind of number
    numbers = bits.view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, 3.3961775e38, 1.00390625, 1.01171875], device="cuda")
    sources = [numbers[~numbers.isnan()], special, torch.randn(0, device="cuda"), torch.randn(2049, device="cuda")]
    sizes = [source.numel() for source in sources]
    whole = torch.zeros(sum(sizes) + 2, device="cuda", dtype=torch.bfloat16)
    pack(whole[1:-1].split(sizes), sources)
    expected = torch.cat(sources).bfloat16()
    assert torch.equal(whole[1:-1].view(torch.int16), expected.view(torch.int16))
    assert whole[0] == whole[-1] == 0, "nothing is written beyond a place"
    pack([whole[:3]], [torch.tensor([torch.nan, 1.0, -torch.nan], device="cuda")])
    assert whole[:3].isnan().tolist() == [True, False, True]


def test_places_beyond_32_bits() -> None:
    size = 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 16 * GIB:
        pytest.skip("needs 16 GiB of free GPU memory")
    ends = [slice(0, 9), slice(2**31 - 9, 2**31 + 9), slice(size - 9, size)]
    source = torch.zeros(size, device="cuda")
    for number, end in enumerate(ends):
        source[end] = torch.arange(1.0, source[end].numel() + 1, device="cuda") + 0.1 * number
    place = torch.ones(size, device="cuda", dtype=torch.bfloat16)
    pack([place], [source])
    for end in ends:
        assert torch.equal(place[end], source[end].bfloat16())
    assert place.count_nonzero() == 9 + 18 + 9
    del source
    rows = place.view(3, size // 3)  # the last row begins beyond 2^30, and ends beyond 2^31
    for end in (slice(0, 9), slice(size // 3 - 9, size // 3)):
        expected = in_order(rows[:, end])
        assert torch.equal(sum_rows(rows, torch.float32)[end], expected) and expected.count_nonzero()
