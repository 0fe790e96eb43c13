"""What a rank's model is called with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from meshloom.kernels.attention import CausalAttention
from meshloom.kernels.documents import Documents
from meshloom.parallel.torch.inputs import mark_dynamic


@pytest.mark.parametrize(("prepare", "compilations"), [(mark_dynamic, 1), (lambda _: None, 2)])
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
