"""Imports of a DeepSpeed folder: which part becomes which, and what is said where one is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.reading.compare import read_array
from meshloom.launch.checkpoint import main
from support.ranks import run_ranks

WEIGHTS = {"a.weight": torch.arange(8.0).reshape(2, 4), "a.bias": torch.arange(4.0)}


def folder(path: Path, tag: str = "global_step100-v2", **model: Any) -> Path:
    """Rank files of ZeRO-2 on two processes, with a group for each parameter, as DeepSpeed lays them out."""
    (path / tag).mkdir(parents=True)
    (path / "latest").write_text(tag)
    shapes = [{name: tuple(value.shape)} for name, value in WEIGHTS.items()]
    torch.save({"param_shapes": shapes, "dp_world_size": 2, **model}, path / tag / "mp_rank_00_model_states.pt")
    for rank in range(2):
        slices = [value.flatten().chunk(2)[rank].clone() for value in WEIGHTS.values()]
        state = {group: {"step": torch.tensor(5.0), "exp_avg": part / 8} for group, part in enumerate(slices)}
        optimizer = {"zero_stage": 2, "single_partition_of_fp32_groups": slices, "base_optimizer_state": {"state": state}}
        torch.save({"optimizer_state_dict": optimizer}, file_of(path, rank))
    return path


def file_of(path: Path, rank: int) -> Path:
    tag = (path / "latest").read_text()
    return path / tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def refusal(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["import", str(path), str(path.parent / "ours")]) == 1
    assert not (path.parent / "ours").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(("model", "step"), [({"global_steps": 100}, 100), ({}, 2)])
def test_step_comes_from_the_model_file_before_the_tag(tmp_path: Path, model: dict[str, Any], step: int) -> None:
    assert main(["import", str(folder(tmp_path / "ds", **model)), str(tmp_path / "ours")]) == 0
    files = open_files(tmp_path / f"ours/step-{step:08}")
    manifest = load_manifest(files)
    for name, value in WEIGHTS.items():
        assert torch.equal(read_array(files, manifest, f"weight/{name}"), value)
        assert torch.equal(read_array(files, manifest, f"exp_avg/{name}"), value / 8)


@pytest.mark.parametrize(("steps", "own"), [(100, True), (101, False)])
def test_a_runs_own_state_is_taken_if_no_step_came_after_it(tmp_path: Path, steps: int, own: bool) -> None:
    """DeepSpeed's client state, and with it ours, may have been handed on to a later save."""
    state = {"config": {}, "counters": {"step": 100.0}, "progress": {"samples": 800, "step": 100}}
    source = folder(tmp_path / "ds", global_steps=steps, meshloom=json.dumps(state))
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    found = load_manifest(open_files(tmp_path / f"ours/step-{steps:08}")).state
    assert (found == state) is own and ("imported_from" in found) is not own


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "moments")
    content = torch.load(file_of(source, 1), weights_only=False)
    del content["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["exp_avg"]
    torch.save(content, file_of(source, 1))
    text = refusal(source, capsys)
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt: there is no exp_avg of group 2 of 2" in text

    for rank in range(2):
        content = torch.load(file_of(source, rank), weights_only=False)
        content["optimizer_state_dict"]["base_optimizer_state"]["state"].pop(1)
        torch.save(content, file_of(source, rank))
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt: there is no exp_avg of group 2 of 2" in refusal(source, capsys)

    source = folder(tmp_path / "last")
    file_of(source, 1).unlink()
    assert "the optimizer file of rank 1 is missing" in refusal(source, capsys)

    source = folder(tmp_path / "shapes", param_shapes=[{"a.weight": (2, 4)}])
    assert "names 1 groups of parameters, the rank files hold 2" in refusal(source, capsys)
    source = folder(tmp_path / "frozen", frozen_param_shapes={"b": (1,)})
    assert "frozen parameters" in refusal(source, capsys)
    source = folder(tmp_path / "model")
    next(source.glob("*/mp_rank_00_model_states.pt")).unlink()
    assert "there is no …mp_rank_00_model_states.pt" in refusal(source, capsys)


class Uneven(nn.Module):
    """Sizes that the round robin deals unevenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = nn.Linear(7, 5), nn.Linear(5, 9), nn.Linear(9, 3)
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.c(torch.tanh(self.b(torch.tanh(self.a(x))))) * self.scale).square().mean()


def inputs(number: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(number + 10 * rank))


def trains(rank: int, world: int, path: str, stage: int) -> None:
    import deepspeed

    from meshloom.parallel.deepspeed.setup import quiet

    model = Uneven()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "round_robin_gradients": True},
    }
    with quiet():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
        for number in range(3):
            engine.backward(engine(inputs(number, rank)))
            engine.step()
        engine.save_checkpoint(path)


@pytest.mark.parametrize("stage", [1, 2])
def test_round_robin_gradients_come_in_right(tmp_path: Path, stage: int) -> None:
    """Weights and moments, against a bare loop over both ranks' inputs."""
    pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")
    from meshloom.parallel.deepspeed.setup import import_deepspeed

    import_deepspeed("cpu")
    run_ranks(2, trains, str(tmp_path / "ds"), stage)
    assert main(["import", str(tmp_path / "ds"), str(tmp_path / "ours")]) == 0
    model = Uneven()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for number in range(3):
        optimizer.zero_grad()
        ((model(inputs(number, 0)) + model(inputs(number, 1))) / 2).backward()
        optimizer.step()
    files = open_files(tmp_path / "ours/step-00000003")
    manifest = load_manifest(files)
    for name, weight in model.named_parameters():
        expected = {"weight": weight.detach(), **{role: optimizer.state[weight][role] for role in ("exp_avg", "exp_avg_sq")}}
        for role, value in expected.items():
            torch.testing.assert_close(read_array(files, manifest, f"{role}/{name}"), value, rtol=1e-4, atol=1e-7)
