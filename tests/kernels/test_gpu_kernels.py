"""Our own GPU kernels against PyTorch in higher precision, at the sizes that they are made for."""

from __future__ import annotations

import pytest
import torch

from meshloom.kernels.loss import IGNORED, sliced_cross_entropy
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.optim.optimizers.parameters import NamedParameter, Unsharded
from meshloom.parallel.replicas import hash_tensor

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("vocabulary", [128_256, 50_257, 37])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_softmax_and_gradient_of_a_chunk(vocabulary: int, dtype: torch.dtype) -> None:
    from meshloom.kernels.triton_loss import softmax_rows

    torch.manual_seed(vocabulary)
    stride = vocabulary + 8 - vocabulary % 8
    buffer = torch.full((300, stride), torch.nan, device="cuda", dtype=dtype)
    logits = buffer[:, :vocabulary]
    logits.copy_(torch.randn(300, vocabulary, device="cuda") * 3)
    logits[5] *= 30  # overflows without a running maximum
    targets = torch.randint(0, vocabulary, (300,), device="cuda")
    targets[7], targets[11] = IGNORED, vocabulary
    exact = logits.double()
    log_sum = exact.logsumexp(1)
    gradient = torch.exp(exact - log_sum[:, None])
    inside = targets.clamp(0, vocabulary - 1)
    gradient[torch.arange(300), inside] -= ((targets >= 0) & (targets < vocabulary)).double()
    gradient[7] = 0

    before = logits.clone()
    sums, picked = softmax_rows(logits, targets, 0, IGNORED, differentiate=False)
    assert torch.equal(logits, before), "statistics alone leave the logits as they are"
    assert (sums - log_sum).abs().max() < 1e-6 * log_sum.abs().max()
    assert picked[7] == picked[11] == -torch.inf
    usual = torch.ones(300, dtype=torch.bool, device="cuda")
    usual[[7, 11]] = False
    assert torch.equal(picked[usual].double(), exact.gather(1, inside[:, None]).squeeze(1)[usual])

    again, _ = softmax_rows(logits, targets, 0, IGNORED)
    assert torch.equal(again, sums)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-4
    assert (logits - gradient).norm() < tolerance * gradient.norm()
    assert (logits - gradient).abs().max() < tolerance
    assert buffer[:, vocabulary:].isnan().all(), "nothing is written beyond a row"
    before_again = before.clone()
    softmax_rows(before_again, targets, 0, IGNORED, log_sum_C=sums)
    assert torch.equal(before_again, logits)


def test_soft_cap_and_z_loss_of_a_chunk() -> None:
    from meshloom.kernels.triton_loss import softmax_rows

    torch.manual_seed(0)
    logits = torch.randn(40, 10_000, device="cuda") * 5
    targets = torch.randint(0, 10_000, (40,), device="cuda")
    leaf = logits.double().requires_grad_()
    capped = 3.0 * torch.tanh(leaf / 3.0)
    log_sum = capped.logsumexp(1)
    loss = log_sum - capped.gather(1, targets[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad((loss + 0.1 * log_sum.square()).sum(), leaf)
    sums, picked = softmax_rows(logits, targets, 0, IGNORED, softcap=3.0, z_loss=0.1)
    assert ((sums - picked) - loss).abs().max() < 1e-4
    assert (logits - gradient).abs().max() < 1e-4


def test_loss_of_two_vocabulary_slices_is_that_of_the_whole() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(70, 64, device="cuda", dtype=torch.bfloat16)
    head = torch.randn(999, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 999, (70,), device="cuda")
    statistics: list[tuple[torch.Tensor, torch.Tensor]] = []

    def collect(log_sum: torch.Tensor, picked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        statistics.append((log_sum, picked))
        return log_sum, picked

    def merged(log_sum: torch.Tensor, picked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_sums, pickeds = zip(*statistics, strict=True)
        return torch.stack(log_sums).logsumexp(0), torch.stack(pickeds).amax(0)

    cuts = [(0, 500), (500, 999)]
    with torch.no_grad():
        for start, stop in cuts:
            sliced_cross_entropy(hidden, head[start:stop], targets, collect, first=start)
    exact = torch.nn.functional.cross_entropy((hidden.double() @ head.double().t()), targets, reduction="sum")
    (expected,) = torch.autograd.grad(exact, head)
    for start, stop in cuts:
        part = head[start:stop].detach().requires_grad_()
        total = sliced_cross_entropy(hidden, part, targets, merged, first=start)
        assert abs(total.item() - exact.item()) < 2e-3 * exact.item()
        (gradient,) = torch.autograd.grad(total, part)
        assert (gradient - expected[start:stop]).norm() < 1e-2 * expected[start:stop].norm()


@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float32])
def test_adamw_in_a_fused_step_is_adamw(gradient_dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    shapes = [(1000, 1003), (17,), (1,)]
    ours = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().double()) for p in ours]
    copies = [torch.full(shape, torch.nan, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    named = [
        NamedParameter(str(i), p, tuple(p.shape), decay=i != 1, compute_copy=copy)
        for i, (p, copy) in enumerate(zip(ours, copies, strict=True))
    ]
    optimizer = AdamW(AdamWConfig(lr=1e-2, weight_decay=0.1), named, Unsharded())
    assert optimizer.fused_step
    groups = [{"params": [p], "weight_decay": 0.0 if i == 1 else 0.1} for i, p in enumerate(theirs)]
    oracle = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        scale = None if step == 3 else torch.tensor(0.1 + step, device="cuda")
        for mine, exact in zip(ours, theirs, strict=True):
            mine.grad_dtype = None
            mine.grad = torch.randn_like(mine).to(gradient_dtype)
            exact.grad = mine.grad.double() * (1.0 if scale is None else scale.double())
        optimizer.gradient_scale = scale
        optimizer.step()
        oracle.step()
        assert optimizer.gradient_scale is None, "a scale is for one step"
    for mine, exact, copy in zip(ours, theirs, copies, strict=True):
        assert (mine - exact).norm() < 1e-6 * exact.norm()
        assert torch.equal(copy, mine.bfloat16())
        state, expected = optimizer.state[mine], oracle.state[exact]
        assert float(state["step"]) == float(expected["step"]) == 5
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (state[moment] - expected[moment]).norm() < 1e-5 * expected[moment].norm()


def test_a_skipped_fused_step_changes_no_bit() -> None:
    torch.manual_seed(2)
    weight = torch.nn.Parameter(torch.randn(300, 77, device="cuda"))
    weight.grad_dtype = None
    copy = weight.detach().bfloat16()
    optimizer = AdamW(AdamWConfig(lr=1e-2), [NamedParameter("w", weight, (300, 77), compute_copy=copy)], Unsharded())
    assert optimizer.fused_step and optimizer.masked_step
    kept: list[torch.Tensor] = []
    for skipped in (0.0, 1.0, 1.0, 0.0):
        # Not a number: what is skipped must not even be read.
        weight.grad = torch.full_like(weight, torch.nan if skipped else 0.5, dtype=torch.bfloat16)
        optimizer.skip = torch.tensor(skipped, device="cuda")
        optimizer.step()
        state = optimizer.state[weight]
        now = [weight.detach().clone(), copy.clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()]
        assert optimizer.skip is None
        if skipped:
            optimizer.forget_steps(1)
            assert all(torch.equal(one, two) for one, two in zip(now, kept, strict=True)) and float(state["step"]) == 1
        kept = now
    oracle_weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    oracle = torch.optim.AdamW([oracle_weight], lr=1e-2, betas=(0.9, 0.95))
    for _ in range(2):
        oracle_weight.grad = torch.full_like(oracle_weight, 0.5)
        oracle.step()
    state = optimizer.state[weight]
    assert float(state["step"]) == 2
    assert float(state["exp_avg"][0, 0]) == pytest.approx(float(oracle.state[oracle_weight]["exp_avg"]), rel=1e-5)


def test_hashes_of_a_gpu_are_those_of_the_cpu() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        tensor = torch.randn(3001, 5).to(dtype)
        assert int(hash_tensor(tensor.cuda())) == int(hash_tensor(tensor))
        assert int(hash_tensor(tensor.cuda()[1:, :].reshape(-1)[1:])) == int(hash_tensor(tensor[1:, :].reshape(-1)[1:]))
