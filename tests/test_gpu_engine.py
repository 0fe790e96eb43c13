"""The engine on one GPU: bf16 weights follow their masters bit for bit, and the one-pass update trains as torch's does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from meshloom.config.parallel import ParallelConfig
from meshloom.data.batch import MicroBatch
from meshloom.models.llama import Llama
from meshloom.optim.adamw import AdamW
from meshloom.optim.parameters import NamedParameter, Shards
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.torch_engine import TorchEngine

pytestmark = pytest.mark.gpu

PARALLEL = ParallelConfig(zero=0)


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    joined = Mesh.connect(Layout.plan(PARALLEL, 1), torch.device("cuda", 0))
    yield joined
    joined.close()


def losses(mesh: Mesh, micro: int, *, fused: bool, compiled: bool) -> tuple[TorchEngine, list[float]]:
    def optimizer(parameters: Sequence[NamedParameter], shards: Shards) -> torch.optim.Optimizer:
        return AdamW(parameters=parameters, shards=shards, lr=1e-2, fused=fused)

    with torch.device("meta"):
        model = Llama(dim=128, layers=2, heads=2, kv_heads=1, ffn_dim=256, vocabulary=1000)
    settings = {"parallel": PARALLEL, "seed": 3, "precision": "bf16", "compile_blocks": compiled, "seq_len": 256}
    engine = make_engine(model, mesh, optimizer, **settings)  # type: ignore[arg-type]
    assert isinstance(engine, TorchEngine)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1000, (4, 257), generator=draw)
    batches = [MicroBatch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens.split(micro)]
    curve: list[float] = []
    for _ in range(8):
        loss = engine.accumulate(batches, torch.tensor(4 * 256.0, device="cuda"))
        engine.clip(0.5, engine.gradient_norm())
        engine.update(1e-2)
        engine.zero_grad()
        curve.append(float(loss.mean))
    return engine, curve


@pytest.mark.parametrize("micro", [4, 2], ids=["one micro-batch", "two"])
def test_one_pass_updates_train_as_torch_does(mesh: Mesh, micro: int) -> None:
    engine, curve = losses(mesh, micro, fused=True, compiled=False)
    _, expected = losses(mesh, micro, fused=False, compiled=False)
    assert curve == pytest.approx(expected, rel=5e-3)
    assert curve[-1] < curve[0] - 1
    weights = {fragment.name: fragment.tensor for fragment in engine.fragments() if fragment.role == "weight"}
    computed = dict(engine.module.named_parameters())
    assert weights.keys() == computed.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(computed[name].detach(), weight.bfloat16()), name


def test_compiled_blocks_give_the_same_losses(mesh: Mesh) -> None:
    _, curve = losses(mesh, 4, fused=True, compiled=True)
    _, expected = losses(mesh, 4, fused=True, compiled=False)
    assert curve == pytest.approx(expected, rel=1e-2)
