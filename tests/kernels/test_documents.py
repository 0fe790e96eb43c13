"""Documents of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from meshloom.kernels.attention import CausalAttention
from meshloom.kernels.documents import Documents, positions


@pytest.mark.parametrize(("prepare", "compilations"), [(Documents.mark_dynamic, 1), (lambda _: None, 2)])
def test_another_number_of_documents_compiles_nothing_again(prepare: Callable[[Documents], None], compilations: int) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    attend = CausalAttention()

    def attended(q: torch.Tensor, documents: Documents) -> torch.Tensor:
        return attend(q * 2, q, q, documents)

    compiled = torch.compile(attended, backend=counter, fullgraph=True)
    for ids in ([0, 0, 1, 1, 2], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]):
        documents, q = Documents.of(torch.tensor([ids])), torch.randn(1, 5, 2, 8)
        prepare(documents)
        torch.testing.assert_close(compiled(q, documents), attended(q, documents))
    assert counter.frame_count == compilations


def test_documents_are_runs_of_equal_ids_in_a_row() -> None:
    documents = Documents.of(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 2, 0, 0]]))
    assert documents.cu_seqlens.tolist() == [0, 2, 5, 7, 8, 10]
    assert documents.cu_seqlens.dtype == torch.int32 and documents.host_cu_seqlens is documents.cu_seqlens


def test_positions_restart_at_each_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [3, 3, 0, 0, 3, 3]])
    expected = [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 1]]
    assert positions(documents).tolist() == expected
