"""Activations of rows on the host by a GPU's copies: gradients, and memory of the device."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch

from meshloom.kernels.documents import Documents
from meshloom.parallel.activation import apply_policies
from meshloom.parallel.hybrid.cost import CostModel
from meshloom.parallel.hybrid.hidden_copies import FORWARD, HiddenCopies
from meshloom.parallel.on_host import RowOffload
from support.models import decoder

pytestmark = pytest.mark.gpu

LAYERS, LENGTH = 8, 2048


def rows(share: float, compiled: bool) -> tuple[list[torch.Tensor], int]:
    """Gradients of three rows together, of which this share is kept on the host, and the bytes that they take of the device."""
    torch.manual_seed(0)
    gc.collect()
    before = torch.cuda.memory_allocated()
    device = torch.device("cuda")
    model = decoder(dim=256, layers=LAYERS, heads=4, kv_heads=2, ffn_dim=1024, vocabulary=256).to(device)
    blocks = dict(enumerate(model.layers.values()))
    offload = RowOffload(HiddenCopies(CostModel(0.0, 1.0 / FORWARD), 1.0, rate=share), blocks, device)
    hidden = [partial(offload.begin_block, layer) for layer in blocks]
    apply_policies(list(blocks.values()), ["none"] * LAYERS, compiled=compiled, hidden=hidden)
    documents = Documents.of(torch.zeros(1, LENGTH, dtype=torch.int64))
    documents = documents.to(device)._replace(host_rings=torch.tensor([1, 0, LENGTH]))
    for row in range(3):
        tokens = torch.randint(0, 256, (1, LENGTH), generator=torch.Generator().manual_seed(row)).to(device)
        if row == 1:  # what the first one compiles, and gradients, are there
            torch.cuda.reset_peak_memory_stats()
        offload.begin_row(documents)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, tokens, documents)
        loss.backward()
    torch.cuda.synchronize()
    return [
        weight.grad.cpu() for weight in model.parameters() if weight.grad is not None
    ], torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_take_less_memory_and_have_the_same_gradients(compiled: bool) -> None:
    expected, most = rows(0.0, compiled)
    for share in (0.3, 1.0):
        found, peak = rows(share, compiled)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * max(float(each.abs().max()) for each in expected))
        assert peak < most
        most = peak
