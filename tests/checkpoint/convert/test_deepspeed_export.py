"""Export to DeepSpeed's formats. DeepSpeed is the oracle: it loads what is exported, and writes the same files itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")

# Imported here so that the ranks, which are forked from this process, need not.
import deepspeed.runtime.bf16_optimizer
import deepspeed.runtime.zero.muon.original_muon
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.convert.deepspeed_export import export_ranks
from meshloom.checkpoint.errors import CheckpointError
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.reading.compare import diff
from meshloom.launch.checkpoint import main
from meshloom.models.decoder import Decoder
from meshloom.parallel.box import Box
from meshloom.parallel.deepspeed.setup import import_deepspeed, quiet
from meshloom.parallel.deepspeed.state_by_stage import state_of
from meshloom.parallel.fragment import Fragment
from support.models import decoder
from support.ranks import run_ranks

SHAPE = {"dim": 24, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 36, "tied": False}
VOCABULARY = 61
ADAMW = {"lr": 2e-3, "weight_decay": 0.2, "betas": [0.8, 0.9], "eps": 1e-7}
STATE: dict[str, Any] = {
    "config": {
        "model": {"_target_": "meshloom.models.decoder.Decoder", "name": "llama", "vocabulary": None, **SHAPE},
        "optim": {"_target_": "meshloom.optim.optimizers.adamw.AdamW", "name": "adamw", **ADAMW},
        "precision": "bf16",
    },
    "counters": {"step": 5.0},
    "progress": {"samples": 40, "step": 7},
}
Arrays = dict[str, torch.Tensor]


def arrays(tied: bool = False) -> Arrays:
    """Of a run that has made some updates; sizes that divide by no number of ranks."""
    draw = torch.Generator().manual_seed(0)
    found: Arrays = {}
    for name, weight in decoder(**{**SHAPE, "tied": tied}, vocabulary=VOCABULARY).named_parameters():
        for role, scale in (("weight", 0.3), ("exp_avg", 1e-3), ("exp_avg_sq", 1e-6)):
            found[f"{role}/{name}"] = torch.rand(weight.shape, generator=draw) * scale
    return found


def save(folder: Path, held: Arrays, state: dict[str, Any] = STATE) -> Path:
    """A checkpoint of step 7."""
    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync"))

    def fragments() -> Iterator[Fragment]:
        for key, tensor in held.items():
            role, _, name = key.partition("/")
            yield Fragment(name, role, tuple(tensor.shape), Box.whole(tensor.shape), tensor)

    checkpointer.save(7, list(fragments()), state)
    checkpointer.finish()
    return folder / "step-00000007"


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"), arrays())


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Group what decays, then what does not. Hyper-parameters of nobody's: the folder's must take their place."""
    named = list(model.named_parameters())
    assert isinstance(model, Decoder)
    return [{"params": [p for n, p in named if model.decays(n) is decays], "weight_decay": 0.0} for decays in (True, False)]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def load(rank: int, world: int, folder: str, stage: int, bf16: bool, universal: bool, tied: bool) -> list[Any]:
    """DeepSpeed by itself: load, say what was loaded, and take a step. Returns (state, hyper-parameters, state after)."""
    import deepspeed

    torch.manual_seed(9)
    model = decoder(**{**SHAPE, "tied": tied}, vocabulary=VOCABULARY)
    model = model.bfloat16() if bf16 else model
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "checkpoint": {"load_universal": universal},
    }
    if bf16:
        config |= {"bf16": {"enabled": True}, "communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    with quiet():
        optimizer = torch.optim.AdamW(groups_of(model), lr=1.0)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        path, client = engine.load_checkpoint(folder)
        assert path is not None and engine.global_steps == 7 and "meshloom" in client
        state = state_of(engine, optimizer, stage)

        def held() -> list[tuple[str, Box, torch.Tensor]]:
            return [(fragment.key, fragment.box, fragment.tensor.clone()) for fragment in state.fragments()]

        before = held()
        hyper = [{key: group[key] for key in ("lr", "weight_decay", "betas", "eps")} for group in optimizer.param_groups]
        computed: Arrays = {}
        for name, weight in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([weight], enabled=stage == 3):
                computed[name] = weight.detach().clone()
        counters = state.counters()
        tokens, targets = batch()
        engine.backward(engine(tokens, targets) / targets.numel())
        engine.step()
    return [before, hyper, computed, counters, held()]


def whole(ranks: list[list[tuple[str, Box, torch.Tensor]]], shapes: Arrays) -> Arrays:
    """The global arrays of all ranks' boxes; every element must be there."""
    found = {key: torch.full(tensor.shape, torch.nan) for key, tensor in shapes.items()}
    for boxes in ranks:
        for key, box, tensor in boxes:
            found[key][box.slices()] = tensor
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


def next_step(held: Arrays, tied: bool) -> Arrays:
    """The oracle's masters after one more step of a bare torch.optim.AdamW."""
    model = decoder(**{**SHAPE, "tied": tied}, vocabulary=VOCABULARY)
    optimizer = torch.optim.AdamW(groups_of(model), lr=ADAMW["lr"], betas=(0.8, 0.9), eps=ADAMW["eps"])  # type: ignore[arg-type]
    optimizer.param_groups[0]["weight_decay"] = ADAMW["weight_decay"]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(held[f"weight/{name}"])
            moments = {role: held[f"{role}/{name}"].clone() for role in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": torch.tensor(5.0), **moments}
    tokens, targets = batch()
    (model(tokens, targets) / targets.numel()).backward()
    optimizer.step()
    return {f"weight/{name}": weight.detach() for name, weight in model.named_parameters()}


def check(folder: Path, ranks: int, stage: int, bf16: bool, held: Arrays, universal: bool = False, tied: bool = False) -> None:
    results = run_ranks(ranks, load, str(folder), stage, bf16, universal, tied)
    before, after = (whole([result[at] for result in results], held) for at in (0, 4))
    for key, tensor in held.items():
        assert torch.equal(before[key], tensor), key
    _, hyper, computed, counters, _ = results[0]
    expected = {key: tuple(value) if isinstance(value, list) else value for key, value in ADAMW.items()}
    bug = universal and stage == 3  # DeepSpeed 0.19.8 then gives every group the first one's
    assert hyper == [expected, {**expected, "weight_decay": ADAMW["weight_decay"] if bug else 0.0}]
    assert counters == {"step": 5.0}
    for name, weight in computed.items():
        assert torch.equal(weight, held[f"weight/{name}"].to(torch.bfloat16 if bf16 else torch.float32)), name
    if not bf16 and not bug:
        for key, tensor in next_step(held, tied).items():
            torch.testing.assert_close(after[key], tensor, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype"),
    [(1, 2, "fp32"), (1, 3, "bf16"), (2, 3, "fp32"), (2, 2, "bf16"), (3, 1, "fp32"), (3, 3, "fp32"), (3, 2, "bf16")],
)
def test_deepspeed_resumes_from_exported_rank_files_round_trip(
    tmp_path: Path, step: Path, stage: int, ranks: int, dtype: str
) -> None:
    import_deepspeed("cpu")
    words = ["export", str(step), str(tmp_path / "ds"), "--format", "deepspeed", "--zero", str(stage), "--ranks", str(ranks)]
    assert main([*words, "--dtype", dtype]) == 0
    comes_back(tmp_path / "ds", tmp_path / "back", step)
    check(tmp_path / "ds", ranks, stage, dtype == "bf16", arrays())


@pytest.mark.parametrize(("stage", "ranks", "bf16"), [(1, 2, False), (1, 2, True), (2, 3, False), (3, 2, True), (3, 3, False)])
def test_deepspeed_resumes_from_exported_universal_round_trip(
    tmp_path: Path, step: Path, stage: int, ranks: int, bf16: bool
) -> None:
    import_deepspeed("cpu")
    assert main(["export", str(step), str(tmp_path / "uc"), "--format", "universal"]) == 0
    comes_back(tmp_path / "uc", tmp_path / "back", step)
    check(tmp_path / "uc", ranks, stage, bf16, arrays(), universal=True)


def comes_back(folder: Path, back: Path, step: Path) -> None:
    """import(export(x)) == x: arrays bit for bit, and the run's state."""
    assert main(["import", str(folder), str(back)]) == 0
    found = open_files(back / step.name)
    assert list(diff(open_files(step), found)) == []
    assert load_manifest(found).state == STATE


def test_tied_weights_are_loaded_once(tmp_path: Path) -> None:
    import_deepspeed("cpu")
    state = copy.deepcopy(STATE)
    state["config"]["model"]["tied"] = True
    tied = save(tmp_path / "run", arrays(tied=True), state)
    export_ranks(open_files(tied), tmp_path / "ds", stage=2, ranks=2, dtype="fp32")
    check(tmp_path / "ds", 2, 2, False, arrays(tied=True), tied=True)


def deepspeed_saves(rank: int, world: int, folder: str, stage: int, bf16: bool) -> None:
    """Three steps of a small model under DeepSpeed, and its own checkpoint."""
    import deepspeed

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5), nn.Linear(5, 1))
    model = model.bfloat16() if bf16 else model
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 40},
    }
    if bf16:
        config |= {"bf16": {"enabled": True}, "communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    matrices = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0, "betas": (0.7, 0.8)}]
    with quiet():
        engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)[0]
        for number in range(3):
            torch.manual_seed(number * world + rank)
            inputs = torch.randn(2, 7).to(torch.bfloat16 if bf16 else torch.float32)
            engine.backward(engine(inputs).float().square().sum())
            engine.step()
        engine.save_checkpoint(folder, tag="global_step3")


PADDING = 4  # elements: three biases and matrices of odd sizes, on two or three ranks


def same(ours: Any, theirs: Any, where: str) -> None:
    """Everything that is in ours is in theirs, the tensors bit for bit but for padding, which is 0 in ours."""
    if isinstance(ours, dict):
        for key, value in ours.items():
            if key not in (
                "meshloom",
                "loss_scaler",
                "clip_grad",
                "global_samples",
                "frozen_param_shapes",
                "frozen_param_fragments",
            ):
                assert key in theirs, f"{where}/{key}"
                same(value, theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            same(one, other, f"{where}/{number}")
    elif isinstance(ours, torch.Tensor):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, where
        odd = ours != theirs
        assert not ours[odd].any() and odd.sum() <= PADDING, where
    else:
        assert ours == theirs, where


@pytest.mark.parametrize(("stage", "ranks", "bf16"), [(1, 2, False), (2, 3, False), (2, 2, True), (3, 2, True), (3, 3, False)])
def test_deepspeeds_own_folder_survives_a_round_trip(tmp_path: Path, stage: int, ranks: int, bf16: bool) -> None:
    """File by file what DeepSpeed wrote: slices, paddings, groups, hyper-parameters, moments, weights to compute with."""
    import_deepspeed("cpu")
    run_ranks(ranks, deepspeed_saves, str(tmp_path / "theirs"), stage, bf16)
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    step = open_files(tmp_path / "ours/step-00000003")
    export_ranks(step, tmp_path / "out", stage=stage, ranks=ranks, dtype="bf16" if bf16 else "fp32", sub_group=40)
    files = sorted(path.name for path in (tmp_path / "out/global_step3").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "theirs/global_step3").iterdir())
    for name in files:
        ours, theirs = (torch.load(tmp_path / side / "global_step3" / name, weights_only=False) for side in ("out", "theirs"))
        same(ours, theirs, name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state, held: state["config"]["optim"].update(_target_="meshloom.optim.lars.LARS"), "only a run with AdamW"),
        (lambda state, held: state["config"]["model"].update(_target_="mine.Model"), "meshloom.models.decoder.Decoder"),
        (lambda state, held: held.pop("exp_avg/norm.weight"), "norm.weight has no exp_avg"),
        (lambda state, held: held.update({"exp_avg/norm.weight": held["exp_avg/norm.weight"].double()}), "not fp32"),
        (lambda state, held: held.update({"max_exp_avg_sq/norm.weight": torch.ones(24)}), "no place for max_exp_avg_sq"),
        (lambda state, held: [state.pop("progress"), state.update(imported_from={})], "without parameter groups"),
    ],
)
def test_a_step_that_deepspeed_could_not_resume_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, says: str
) -> None:
    state, held = copy.deepcopy(STATE), arrays()
    change(state, held)
    step = save(tmp_path / "run", held, state)
    assert main(["export", str(step), str(tmp_path / "out"), "--format", "universal"]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_misuse_of_the_command_is_refused(tmp_path: Path, step: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def export(*words: str) -> str:
        assert main(["export", str(step), str(tmp_path / "out"), *words]) == 1
        return capsys.readouterr().err

    ranks = ["--format", "deepspeed", "--zero", "3", "--ranks", "2"]
    assert "--zero and --ranks" in export("--format", "deepspeed", "--zero", "3")
    assert "--zero and --ranks" in export("--format", "universal", "--ranks", "3")
    assert "--dtype" in export("--format", "universal", "--dtype", "bf16")
    assert "--tokenizer" in export(*ranks, "--tokenizer", "x.json")
    assert "bf16 or fp32" in export(*ranks, "--dtype", "fp16")
    assert "at least 1" in export("--format", "deepspeed", "--zero", "3", "--ranks", "0")
    (tmp_path / "out").mkdir()
    assert "exists already" in export(*ranks)
    with pytest.raises(CheckpointError, match="stage 1, 2 or 3"):
        export_ranks(open_files(step), tmp_path / "other", stage=0, ranks=1, dtype=None)
