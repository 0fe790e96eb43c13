"""The loss without logits is the loss with them: value, every gradient, and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from meshloom.kernels.loss import IGNORED, linear_cross_entropy


def problem(tokens: int, dim: int, vocabulary: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Any:
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    hidden = torch.randn(tokens, dim, dtype=torch.float64, generator=generator).to(device, dtype).requires_grad_()
    head = (torch.randn(vocabulary, dim, dtype=torch.float64, generator=generator) / 2).to(device, dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)
    return hidden, head, targets


def plain(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ head.t(), targets, reduction="sum", ignore_index=IGNORED)


def gradients(loss: Callable[..., torch.Tensor], hidden: torch.Tensor, head: torch.Tensor, *rest: Any, **named: Any) -> Any:
    total = loss(hidden, head, *rest, **named)
    return total.detach(), *torch.autograd.grad(total * 0.37, (hidden, head))


@pytest.mark.parametrize("chunk", [1, 7, 12, 36, 4096])
@pytest.mark.parametrize("ignore", [[], [0, 5], list(range(7, 14)), list(range(36))], ids=["none", "two", "a chunk", "all"])
def test_loss_and_gradients_are_those_of_plain_logits(chunk: int, ignore: list[int]) -> None:
    hidden, head, targets = problem(36, 16, 53)
    targets[ignore] = IGNORED
    for ours, oracle in zip(
        gradients(linear_cross_entropy, hidden, head, targets, chunk=chunk),
        gradients(plain, hidden, head, targets),
        strict=True,
    ):
        assert (ours - oracle).abs().max() < 1e-12


def bent(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, *, softcap: float | None, z_loss: float
) -> torch.Tensor:
    """The loss whose gradient is wanted, from whole logits."""
    logits = hidden @ head.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_sums = logits[targets != IGNORED].logsumexp(1)
    loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    return loss + z_loss * log_sums.square().sum()


@pytest.mark.parametrize(("softcap", "z_loss"), [(0.7, 0.0), (None, 0.3), (2.0, 0.05)])
def test_softcap_and_z_loss_are_differentiated(softcap: float | None, z_loss: float) -> None:
    hidden, head, targets = problem(12, 8, 21)
    targets[[1, 5]] = IGNORED
    rule = {"softcap": softcap, "z_loss": z_loss}
    total, *ours = gradients(linear_cross_entropy, hidden, head, targets, chunk=5, **rule)
    _, *expected = gradients(bent, hidden, head, targets, **rule)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert total == pytest.approx(bent(hidden, head, targets, softcap=softcap, z_loss=0.0).item(), rel=1e-12)


def test_gradcheck() -> None:
    hidden, head, targets = problem(6, 3, 5)
    targets[2] = IGNORED
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets, chunk=4), (hidden, head))


def test_extreme_logits_stay_finite() -> None:
    hidden, head, targets = problem(8, 4, 11)
    large = (hidden * 1e4).detach().requires_grad_()
    for ours, oracle in zip(
        gradients(linear_cross_entropy, large, head, targets, chunk=3), gradients(plain, large, head, targets), strict=True
    ):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    hidden, head, targets = problem(40, 16, 53, dtype)
    ours = gradients(linear_cross_entropy, hidden, head, targets, chunk=16)
    oracle = gradients(plain, hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_(), targets)
    assert ours[0].dtype == torch.float32
    assert [gradient.dtype for gradient in ours[1:]] == [dtype, dtype]
    for mine, theirs in zip(ours, oracle, strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def test_head_gradient_is_summed_over_chunks_in_fp32() -> None:
    """512 chunks each add the same small number to the head's gradient: bf16 would stop growing at 256 of them."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, head, torch.zeros(512, dtype=torch.int64), chunk=1).backward()
    assert head.grad is not None
    assert head.grad.flatten().tolist() == [-256.0, 256.0]


def test_frozen_head_or_hidden() -> None:
    hidden, head, targets = problem(10, 4, 7)
    _, to_hidden, to_head = gradients(plain, hidden, head, targets)
    (only_hidden,) = torch.autograd.grad(linear_cross_entropy(hidden, head.detach(), targets, chunk=4), hidden)
    (only_head,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), head, targets, chunk=4), head)
    torch.testing.assert_close(only_hidden * 0.37, to_hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(only_head * 0.37, to_head, rtol=1e-12, atol=1e-12)


def test_target_outside_the_vocabulary_is_seen() -> None:
    hidden, head, targets = problem(10, 4, 7)
    for wrong in (7, -1):
        targets[4] = wrong
        assert linear_cross_entropy(hidden, head, targets).item() == float("inf")


def test_no_tokens_and_bad_chunk() -> None:
    hidden, head, targets = problem(0, 4, 7)
    total, to_hidden, to_head = gradients(linear_cross_entropy, hidden, head, targets)
    assert (total.item(), tuple(to_hidden.shape), to_head.abs().sum().item()) == (0.0, (0, 4), 0.0)
    with pytest.raises(ValueError, match="chunk"):
        linear_cross_entropy(hidden, head, targets, chunk=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest storage and the matmuls that pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.matmuls = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        self.matmuls += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return result


def test_tokens_by_vocabulary_is_never_made() -> None:
    hidden, head, targets = problem(256, 8, 512)
    with LargestTensor() as seen:
        linear_cross_entropy(hidden, head, targets, chunk=16).backward()
    assert seen.elements <= 16 * 512, "a chunk's logits (the head itself has 8 × 512)"
    assert seen.matmuls == 3 * 16
    with LargestTensor() as seen:
        plain(hidden, head, targets)
    assert seen.elements == 256 * 512, "the counter sees what it should"


def test_evaluation_makes_no_gradients() -> None:
    hidden, head, targets = problem(64, 8, 32)
    with torch.no_grad(), LargestTensor() as seen:
        total = linear_cross_entropy(hidden, head, targets, chunk=16)
    assert not total.requires_grad
    assert seen.matmuls == 4
    torch.testing.assert_close(total, plain(hidden, head, targets).detach(), rtol=1e-12, atol=0)


def test_backward_twice_gives_the_same() -> None:
    hidden, head, targets = problem(12, 4, 9)
    total = linear_cross_entropy(hidden, head, targets, chunk=5)
    once = torch.autograd.grad(total, (hidden, head), retain_graph=True)
    again = torch.autograd.grad(total, (hidden, head))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [4096, 5003])
def test_fused_kernels_on_a_gpu(vocabulary: int) -> None:
    hidden, head, targets = problem(1000, 256, vocabulary, torch.bfloat16, "cuda")
    targets[::7] = IGNORED
    ours = gradients(linear_cross_entropy, hidden, head, targets, chunk=300)
    exact = gradients(plain, hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_(), targets)
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine - theirs).norm() <= 1e-2 * theirs.norm()


def test_padding_of_an_odd_vocabulary_is_not_read() -> None:
    """PyTorch fills new memory with NaN on request. CPUs with AMX then had NaN in hidden's gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in ((128, 24), (61, 24)))
    targets = torch.randint(0, 61, (128,), generator=generator)
    torch.use_deterministic_algorithms(True)
    try:
        linear_cross_entropy(hidden, head, targets).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    assert head.grad is not None and head.grad.isfinite().all()
