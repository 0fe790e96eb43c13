"""The engine on one GPU: bf16 weights follow their masters bit for bit, and the one-pass update trains as torch's does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from meshloom.config.parallel import ParallelConfig
from meshloom.data.batch import MicroBatch
from meshloom.models.llama import Llama
from meshloom.optim.adamw import AdamW
from meshloom.optim.parameters import NamedParameter, OnePass, Shards
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh, pick_device
from meshloom.parallel.torch_engine import TorchEngine

pytestmark = pytest.mark.gpu

PARALLEL = ParallelConfig(zero=0)


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
        loss = engine.accumulate(batches, torch.tensor(4 * 256.0, device=mesh.device))
        engine.clip(0.5, engine.gradient_norm())
        engine.update(1e-2)
        engine.zero_grad()
        curve.append(float(loss.mean))
    return engine, curve


def measure(micro: int, fused: bool, compiled: bool) -> dict[str, Any]:
    """Losses, and the names of weights whose low-precision copy is another number: in a process of its own.

    Tests after this one fork, and what CUDA and process groups start does not survive that.
    """
    arguments = [str(micro), str(int(fused)), str(int(compiled))]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("micro", [4, 2], ids=["one micro-batch", "two"])
def test_one_pass_updates_train_as_torch_does(micro: int) -> None:
    ours, theirs = measure(micro, fused=True, compiled=False), measure(micro, fused=False, compiled=False)
    assert (ours["one_pass"], theirs["one_pass"]) == (True, False)
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-2)
    assert ours["losses"][-1] < ours["losses"][0] - 1
    assert ours["different"] == theirs["different"] == []


def test_compiled_blocks_give_the_same_losses() -> None:
    plain, compiled = measure(4, fused=True, compiled=False), measure(4, fused=True, compiled=True)
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-2)


def main() -> None:
    micro, fused, compiled = (int(argument) for argument in sys.argv[1:])
    mesh = Mesh.connect(Layout.plan(PARALLEL, 1), pick_device())
    engine, curve = losses(mesh, micro, fused=bool(fused), compiled=bool(compiled))
    weights = {fragment.name: fragment.tensor for fragment in engine.fragments() if fragment.role == "weight"}
    computed = dict(engine.module.named_parameters())
    assert weights.keys() == computed.keys()
    different = [name for name, weight in weights.items() if not torch.equal(computed[name].detach(), weight.bfloat16())]
    one_pass = isinstance(engine.optimizer, OnePass) and engine.optimizer.one_pass
    print(json.dumps({"losses": curve, "different": different, "one_pass": one_pass}))
    mesh.close()


if __name__ == "__main__":
    main()
