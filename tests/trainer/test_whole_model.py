"""A model gathered whole from a running engine is the one that its checkpoint holds, under any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.trainer.build import Run, build_model
from meshloom.trainer.run import run
from meshloom.trainer.whole_model import gather_whole_model, load_whole_model
from support.configs import resolve_words
from support.ranks import run_ranks
from support.tiny_run import TINY

EXPERTS = "model.experts={count:8,top_k:2,ffn_dim:8,scores:sigmoid,bias:true}"


def compared(rank: int, world_size: int, words: list[str], folder: str) -> float:
    """Train, gather the model before the run closes, and compare it with the checkpoint's. Returns the largest weight."""
    dtype = torch.bfloat16 if EXPERTS in words else torch.float64
    resolved, gathered = resolve_words(TINY, words, world_size), list[torch.nn.Module]()
    build: Callable[[], Any] = lambda: build_model(resolved.config.model, 61)  # noqa: E731
    close = Run.close

    def gather_first(self: Run) -> None:
        gathered.append(gather_whole_model(build(), self.loop.engine, self.loop.mesh, dtype))
        close(self)

    Run.close = gather_first  # type: ignore[method-assign]  # in this forked process alone
    assert run(resolved) == 0
    checkpoint, cpu = Path(folder) / "checkpoints/step-00000002", torch.device("cpu")
    saved = load_whole_model(build(), checkpoint, cpu, dtype)
    expected = saved.state_dict()
    found = gathered[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    if dtype == torch.bfloat16:  # a router's bias moves by less than bf16 can tell
        exact = load_whole_model(build(), checkpoint, cpu, torch.float64).state_dict()
        biases = [name for name in exact if name.endswith("router.bias")]
        assert biases and all(torch.equal(found[name], exact[name].float()) and exact[name].any() for name in biases)
    return max(float(weight.abs().max()) for weight in found.values())


@pytest.mark.parametrize(
    "words",
    [
        ["parallel.zero=1"],
        ["parallel.zero=3", "model.tied=true"],
        ["parallel.tp=2"],
        ["parallel.pp=2"],
        [EXPERTS, "balance.bias_rate=0.001"],
    ],
)
def test_a_gathered_model_is_the_checkpoint_s(words: list[str], tmp_path: Path) -> None:
    found = run_ranks(2, compared, [*words, "trainer.steps=2", "trainer.eval_every=0", f"output_dir={tmp_path}"], str(tmp_path))
    assert found[0] == found[1] > 0
