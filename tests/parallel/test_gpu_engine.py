"""The engine on one GPU: bf16 weights follow their masters bit for bit, and neither the one-pass update nor an activation
policy nor compilation changes what is learnt."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from meshloom.data.assignment import Share
from meshloom.data.batch import MicroBatch
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.optim.optimizers.matrix_config import MuonConfig
from meshloom.optim.optimizers.muon import Muon
from meshloom.optim.optimizers.parameters import FusedStep, NamedParameter, Shards
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh, pick_device
from meshloom.parallel.torch.engine import TorchEngine
from support.environment import with_tests_on_path
from support.models import decoder
from support.settings import settings_of

pytestmark = pytest.mark.gpu

PARALLEL = ParallelConfig(zero=0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A short training run. large: of a size at which what blocks keep is most of the memory."""

    micro: int = 4
    fused: bool = True
    muon: bool = False
    compile: bool = False
    activation: str = "none"
    large: bool = False
    steps: int = 8

    @property
    def rate(self) -> float:
        """Learning rate; a large model at the small one's shows the last bit of every product within four steps."""
        return 1e-3 if self.large else 1e-2


def run(mesh: Mesh, case: Case) -> dict[str, Any]:
    """Its losses, what its first forward pass left in memory (MiB), and weights that are not their masters' rounded values."""

    def optimizer(parameters: Sequence[NamedParameter], shards: Shards) -> torch.optim.Optimizer:
        if case.muon:
            return Muon(MuonConfig(lr=case.rate), parameters, shards)
        return AdamW(AdamWConfig(lr=case.rate, fused=case.fused), parameters, shards)

    shape = (512, 4, 8, 4, 1536) if case.large else (128, 2, 2, 1, 256)
    length = 1024 if case.large else 256
    with torch.device("meta"):
        dim, layers, heads, kv_heads, ffn_dim = shape
        model = decoder(dim=dim, layers=layers, heads=heads, kv_heads=kv_heads, ffn_dim=ffn_dim, vocabulary=1000)
    settings = settings_of(model, PARALLEL, case.activation, precision="bf16", compile=case.compile, seq_len=length, seed=3)
    engine = make_engine(model, mesh, optimizer, PARALLEL, settings)
    assert isinstance(engine, TorchEngine)
    tokens = torch.randint(0, 1000, (4, length + 1), generator=torch.Generator().manual_seed(0))
    batches = [MicroBatch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens.split(case.micro)]
    share = Share(batches, passes=len(batches), workers=len(batches))
    curve: list[float] = []
    peak = 0.0
    for _ in range(case.steps):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = engine.accumulate(share, torch.tensor(4.0 * length, device=mesh.device))
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        engine.clip(0.5, engine.gradient_norm())
        engine.update(case.rate)
        engine.zero_grad()
        curve.append(float(loss.mean))
    weights = {fragment.name: fragment.tensor for fragment in engine.fragments() if fragment.role == "weight"}
    computed = dict(engine.module.named_parameters())
    assert weights.keys() == computed.keys()
    different = [name for name, weight in weights.items() if not torch.equal(computed[name].detach(), weight.bfloat16())]
    fused_step = isinstance(engine.optimizer, FusedStep) and engine.optimizer.fused_step
    return {"losses": curve, "different": different, "fused_step": fused_step, "peak": peak}


def measure(*cases: Case) -> list[dict[str, Any]]:
    """`run` of each case, in a process of their own.

    Tests after this one fork, and what CUDA and process groups start does not survive that.
    """
    asked = json.dumps([dataclasses.asdict(case) for case in cases])
    environment = with_tests_on_path()
    command = [sys.executable, __file__, asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_fused_updates_train_as_torch_does() -> None:
    cases = [Case(micro, fused) for micro in (4, 2) for fused in (True, False)]
    for ours, theirs in zip(*[iter(measure(*cases))] * 2, strict=True):
        assert (ours["fused_step"], theirs["fused_step"]) == (True, False)
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-2)
        assert ours["losses"][-1] < ours["losses"][0] - 0.5
        assert ours["different"] == theirs["different"] == []


def test_muons_update_is_fused_whether_gradients_are_added_up_or_not() -> None:
    one, several = measure(Case(4, muon=True), Case(2, muon=True))
    for found in (one, several):
        assert found["fused_step"] and found["different"] == []
        assert found["losses"][-1] < found["losses"][0] - 0.5
    assert one["losses"] == pytest.approx(several["losses"], rel=1e-2)


POLICIES = ("none", "selective", "full", "offload")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_policies_keep_less_and_change_nothing(compiled: bool) -> None:
    cases = [Case(compile=compiled, activation=policy, large=True, steps=4) for policy in POLICIES]
    plain, *found = measure(Case(large=True, steps=4), *cases)
    for case, got in zip(cases, found, strict=True):
        assert got["losses"] == pytest.approx(plain["losses"], rel=1e-2), case
        assert got["different"] == []
    peaks = dict(zip(POLICIES, (got["peak"] for got in found), strict=True))
    assert peaks["full"] < peaks["selective"] < peaks["none"], peaks
    assert peaks["offload"] < peaks["none"], peaks


def main() -> None:
    mesh = Mesh.connect(Layout.plan(PARALLEL, 1), pick_device())
    results: list[dict[str, Any]] = []
    for asked in json.loads(sys.argv[1]):
        results.append(run(mesh, Case(**asked)))
        gc.collect()
    print(json.dumps(results))
    mesh.close()


if __name__ == "__main__":
    main()
