"""Activations of rows on the host, as far as copies are hidden: the share, the blocks, and exact gradients."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import pytest
import torch

from meshloom.kernels.documents import Documents
from meshloom.parallel import on_host
from meshloom.parallel.activation import apply_policies
from meshloom.parallel.hybrid.cost import CostModel
from meshloom.parallel.hybrid.hidden_copies import FORWARD, HiddenCopies
from meshloom.parallel.on_host import RowOffload
from support.models import decoder

LAYERS, LENGTH = 5, 16
TOKENS = torch.randint(0, 100, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def test_hidden_copies_grow_with_the_length() -> None:
    rule = HiddenCopies(CostModel(quadratic=2e-9, linear=1e-5), token_bytes=1e6, rate=5e10)
    # (2e-9 n + 1e-5) s for a token beside 2e-5 s for its copy: of 1,000 tokens 0.28 of 1.2e-5 / 2e-5
    assert rule.share((4, 0, 1000)) == pytest.approx(FORWARD * 0.6)
    assert rule.share((4, 1, 1000, 2, 3)) == pytest.approx(FORWARD * 0.6), "a shared document's parts are all alike"
    assert rule.share((4, 1, 8000, 0, 2, 1000, 1000)) == pytest.approx(FORWARD * (4 * 1.3 + 2 * 0.6) / 6)
    assert rule.share((4, 0, 100_000)) == 1.0 and rule.share((4, 0)) == 0.0


def test_blocks_on_the_host_are_spread_evenly() -> None:
    rule = HiddenCopies(CostModel(0.0, 1.0 / FORWARD), token_bytes=1.0, rate=0.0)
    chosen = [sorted(HiddenCopies(rule.costs, 1.0, rate).layers((1, 0, 8), 8)) for rate in (0.1, 0.2, 0.3, 0.5, 0.99, 1.0)]
    assert chosen == [[], [0], [0, 3], [0, 1, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert not HiddenCopies(rule.costs, 1.0, 1.0).layers((1, 0, 8), 2), "the last two blocks stay on the device"


def test_the_host_holds_so_much_of_a_row() -> None:
    rule = HiddenCopies(CostModel(0.0, 1.0 / FORWARD), token_bytes=1.0, rate=1.0, host_bytes=6.0)
    assert (rule.share((1, 0, 6)), rule.share((1, 0, 8)), rule.share((1, 0, 4, 4, 4))) == (1.0, 0.75, 0.5)


def gradients(
    share: float | None, during: Any = None, *, watch: Any = lambda _number, _output: None, compiled: bool = False
) -> torch.Tensor:
    """Of a decoder whose row keeps this share on the host.

    during: called between both passes; watch: called with each block's number and output
    """
    torch.manual_seed(0)
    model = decoder(dim=64, layers=LAYERS, heads=4, kv_heads=2, ffn_dim=96, vocabulary=100).double()
    blocks = list(model.layers.values())
    rule = HiddenCopies(CostModel(0.0, 1.0 / FORWARD), 1.0, rate=share or 0.0)
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda _block, _arguments, outputs, at=number: watch(at, outputs[0]))
    offload = RowOffload(rule, dict(enumerate(blocks)), torch.device("cpu"))
    if share is not None:
        hidden = [partial(offload.begin_block, layer) for layer in range(LAYERS)]
        apply_policies(blocks, ["none"] * LAYERS, compiled=compiled, hidden=hidden)
    documents = Documents.of(torch.zeros(1, LENGTH, dtype=torch.int64))._replace(host_rings=torch.tensor([1, 0, LENGTH]))
    found = []
    for _ in range(2):  # rows
        offload.begin_row(documents)
        loss = model(TOKENS, TOKENS)
        if during is not None:
            during()
        loss.backward()
        found += [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat(found)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.45, 1.0])
def test_gradients_are_the_same(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_host, "SMALL", 0)
    assert torch.equal(gradients(share), gradients(None))


def test_each_tensor_is_copied_out_in_one_pass_and_back_in_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_host, "SMALL", 0)
    copies, plain_copy = [0], torch.Tensor.copy_

    def copy(target: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copies[-1] += 1
        return plain_copy(target, source, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    of_share = {}
    for share in (0.0, 0.2, 0.45, 1.0):
        copies[:] = [0]
        gradients(share, during=lambda: copies.append(0))
        forward, backward, again = copies[0], copies[1], copies[2]
        assert (backward, again) == (2 * forward, forward)  # the first row's way back, and the second one's out; its way back
        of_share[share] = forward
    assert of_share[0.0] == 0 and of_share[0.45] == 2 * of_share[0.2] and of_share[1.0] == (LAYERS - 2) * of_share[0.2]


@pytest.mark.parametrize("share", [0.2, 0.45, 1.0])
def test_n_blocks_on_the_host_make_room_for_n(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the forward pass no original is left, and in a backward pass no more is back than others have freed."""
    monkeypatch.setattr(on_host, "SMALL", 0)
    originals: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []
    back, began = [0], dict[int, int]()
    plain_begin, plain_copy = RowOffload.begin_block, torch.Tensor.copy_

    def begin_block(offload: RowOffload, layer: int) -> Any:
        copies = plain_begin(offload, layer)
        if copies is not None:
            end = copies.end

            def record(tensors: Any) -> None:  # between an FFN's products, where nothing else holds a tensor
                originals.extend(weakref.ref(tensor) for tensor in tensors if tensor.shape == (1, LENGTH, 96))
                end(tensors)

            monkeypatch.setattr(copies, "end", record)
        return copies

    def copy(target: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        back[0] += 1
        return plain_copy(target, source, *args, **kwargs)

    def watch(number: int, output: torch.Tensor) -> None:
        output.register_hook(lambda _gradient: began.update({number: back[0]}))

    def during() -> None:
        left.append(sum(original() is not None for original in originals))
        began.clear()
        back.append(back[0])
        back[0] = 0

    monkeypatch.setattr(RowOffload, "begin_block", begin_block)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    gradients(share, during, watch=watch)
    assert originals and left == [0, 0]
    chosen = HiddenCopies(CostModel(0.0, 1.0 / FORWARD), 1.0, rate=share).layers((1, 0, LENGTH), LAYERS)
    each = back[0] / len(chosen)  # tensors of a block
    for number in range(LAYERS):
        until = began[number - 1] if number else back[0]  # what is loaded during the backward pass of this block
        loaded = until / each - sum(other > number for other in chosen)
        others = sum(other not in chosen for other in range(number + 1))
        assert others + loaded <= LAYERS - len(chosen)


def test_compiled_blocks_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_host, "SMALL", 0)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.testing.assert_close(gradients(0.45, compiled=True), gradients(None), rtol=0, atol=1e-12)
