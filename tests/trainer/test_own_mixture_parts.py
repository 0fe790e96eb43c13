"""Parts of a mixture by classes of a user's own, named in a folder that a person gives as --config-dir."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.models.mixture.config import ExpertsConfig, MixtureConfig
from meshloom.models.mixture.mixture import Mixture
from meshloom.models.part_config import FeedForwardConfig, MatrixScales
from meshloom.trainer.run import run
from support.configs import problems_of, resolve_words
from support.ranks import run_ranks
from support.tiny_run import TINY

CODE = """
import torch
from meshloom.models.mixture.router import TopKRouter

class CosineRouter(TopKRouter):
    '''Logits are cosines over a temperature (X-MoE, arXiv 2204.09179).'''

    def __init__(self, config, temperature):
        super().__init__(config)
        self.temperature = temperature

    def logits(self, x_TD):
        rows_ED = self.weight.to(x_TD.dtype)
        dots_TE = super().logits(x_TD)
        return dots_TE / (x_TD.norm(dim=1)[:, None] * rows_ED.norm(dim=1) * self.temperature)

class DotRouter(CosineRouter):
    def logits(self, x_TD):
        return x_TD @ self.weight.to(x_TD.dtype).T / self.temperature

class Loop:
    def __call__(self, rows_NI, weight_EOI, counts_E):
        out, at = [], 0
        for weight_OI, count in zip(weight_EOI, counts_E.tolist()):
            out += [row @ weight_OI.T for row in rows_NI[at : at + count]]
            at += count
        return torch.stack(out)

class Sum:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, y_TKD, gates_TK):
        return self.factor * torch.einsum("tkd,tk->td", y_TKD, gates_TK)

class Sorted:
    '''Makes a journey: rows by indexing, whose gradient autograd finds.'''

    def __call__(self, assignment):
        self.order_N, self.inverse_TK, self.counts_E = assignment.order_N, assignment.inverse_TK, assignment.counts_E
        return self

    def send(self, x_TD):
        return x_TD[self.order_N // self.inverse_TK.shape[1]], self.counts_E

    def back(self, rows_ND):
        return rows_ND[self.inverse_TK]
"""
OWN = {
    "router": {"_target_": "own_mixture.DotRouter", "temperature": 1.0},
    "dispatch": {"_target_": "own_mixture.Sorted"},
    "product": {"_target_": "own_mixture.Loop"},
    "combine": {"_target_": "own_mixture.Sum", "factor": 1.0},
}
MODEL = """
defaults: [base_llama, _self_]
dim: 16
layers: 2
heads: 2
kv_heads: 1
ffn_dim: 24
experts:
  count: 4
  ffn_dim: 8
  parts:
    router: {_target_: own_mixture.CosineRouter, temperature: 0.1}
    product: {_target_: own_mixture.Loop}
    combine: {_target_: own_mixture.Sum, factor: 0.5}
"""
PARTS = "model.experts.parts"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "own_mixture.py").write_text(CODE)
    (tmp_path / "mine" / "model" / "own.yaml").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path / "mine")
    monkeypatch.delitem(sys.modules, "own_mixture", raising=False)
    return tmp_path / "mine"


def computed(parts: dict[str, Any]) -> list[torch.Tensor]:
    """A mixture's output and gradients with these parts."""
    keys = ExpertsConfig.of({"count": 4, "parts": parts})
    mixture = Mixture(MixtureConfig(FeedForwardConfig(6, 5, MatrixScales(1.0, 1.0, 1.0)), keys)).double()
    draw = torch.Generator().manual_seed(0)
    for weight in mixture.parameters():
        torch.nn.init.normal_(weight, generator=draw)
    x = torch.randn(2, 7, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    y, *_ = mixture([x] * mixture.num_inputs(x), None)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *mixture.parameters()])]


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("part", OWN)
def test_a_part_of_ones_own_takes_the_place_of_ours(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for one, other in zip(computed({part: OWN[part]}), computed({}), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    def refuse(*_: object) -> None:
        raise RuntimeError(part)

    own: Any = importlib.import_module("own_mixture")
    methods = {"router": (own.DotRouter, "logits"), "dispatch": (own.Sorted, "send")}
    monkeypatch.setattr(*methods.get(part, (getattr(own, OWN[part]["_target_"].split(".")[1]), "__call__")), refuse)
    with pytest.raises(RuntimeError, match=part):
        computed(OWN)


def body(rank: int, world_size: int, mine: str, words: list[str]) -> int:
    base = [word for word in TINY if not word.startswith("model.")]
    return run(resolve_words([*base, "model=own"], words, world_size, mine))


def curve(mine: Path, ranks: int, *words: str) -> list[float]:
    folder = mine.parent / f"run-{ranks}"
    assert run_ranks(ranks, body, str(mine), [f"output_dir={folder}", "trainer.steps=2", *words]) == [0] * ranks
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "grad_norm" in row]


def test_a_folder_of_ones_own_trains_the_same_run_on_two_ranks(mine: Path) -> None:
    assert curve(mine, 2, "parallel.tp=2", "parallel.ep=2") == pytest.approx(curve(mine, 1), rel=1e-9)


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        (f"{PARTS}.router={{temperature:1}}", f"{PARTS}.router", "names no class"),
        (f"{PARTS}.router._target_=nowhere.Router", "model", "No module named 'nowhere'"),
        (f"{PARTS}.router._target_=torch.nn.Identity", "model", "is no meshloom.models.mixture.router.Router"),
        (f"{PARTS}.combine._target_=builtins.dict", "model", "makes nothing that can be called"),
        (f"{PARTS}.dispatch._target_=own_mixture.Sorted parallel.ep=2", f"{PARTS}.dispatch", "parallel.ep=1"),
        (f"{PARTS}.router._target_=own_mixture.DotRouter model.experts.router=recurrent", "model.experts.router", "use top_k"),
        ("model.experts.router=best", "model.experts.router", f"or {PARTS}.router"),
    ],
)
def test_parts_that_can_not_be_made_are_named(words: str, key: str, says: str) -> None:
    assert says in problems_of(2, "recipe=moe_tiny", *words.split())[key]
