"""The loss over slices of the vocabulary is the plain loss: any number of ranks, any vocabulary, targets on any slice."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from meshloom.kernels.loss import IGNORED
from meshloom.parallel.tensor.vocabulary import VocabularyParallelLoss
from support.ranks import run_ranks

TOKENS, DIM = 30, 8


def problem(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    hidden = torch.randn(TOKENS, DIM, dtype=torch.float64, generator=generator)
    head = torch.randn(vocabulary, DIM, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, vocabulary, (TOKENS,), generator=generator)
    targets[:2] = torch.tensor([0, vocabulary - 1])  # the ends of the first and the last slice
    targets[6:13] = IGNORED
    return hidden, head, targets


def plain(vocabulary: int) -> list[torch.Tensor]:
    hidden, head, targets = problem(vocabulary)
    hidden.requires_grad_()
    head.requires_grad_()
    total = F.cross_entropy(hidden @ head.t(), targets, reduction="sum", ignore_index=IGNORED)
    return [total.detach(), *torch.autograd.grad(total * 0.37, (hidden, head))]


class Collectives(TorchDispatchMode):
    """Sizes of the tensors that this rank sends."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace and "autograd" not in func.name() and "wait" not in func.name():
            self.sent += [leaf.numel() for leaf in torch.utils._pytree.tree_leaves(args[0]) if torch.is_tensor(leaf)]
        return func(*args, **(kwargs or {}))


def sliced(rank: int, world_size: int, vocabulary: int, chunk: int) -> Any:
    mesh = init_device_mesh("cpu", (world_size,))
    hidden, head, targets = problem(vocabulary)
    warnings.filterwarnings("error", message=".*deprecated", category=FutureWarning)
    hidden = DTensor.from_local(hidden, mesh, [Replicate()]).requires_grad_()
    head = distribute_tensor(head, mesh, [Shard(0)]).requires_grad_()
    with Collectives() as collectives:
        total = VocabularyParallelLoss(mesh)(hidden, head, targets, chunk=chunk)
    gradients = torch.autograd.grad(total * 0.37, (hidden, head))
    assert gradients[1].placements == (Shard(0),), "the head's gradient stays where the head is"
    with torch.no_grad():
        evaluated = VocabularyParallelLoss(mesh)(hidden, head, targets, chunk=chunk)
    return [total.detach(), *(gradient.full_tensor() for gradient in gradients)], evaluated, collectives.sent


@pytest.mark.parametrize(("ranks", "vocabulary", "chunk"), [(2, 48, 7), (2, 51, 64), (4, 53, 6), (4, 7, 10)])
def test_value_and_gradients_are_those_of_plain_logits(ranks: int, vocabulary: int, chunk: int) -> None:
    oracle = plain(vocabulary)
    for found, evaluated, sent in run_ranks(ranks, sliced, vocabulary, chunk):
        for ours, theirs in zip([*found, evaluated], [*oracle, oracle[0]], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert sent == [2 * min(chunk, TOKENS - start) for start in range(0, TOKENS, chunk)], "two numbers per token"
