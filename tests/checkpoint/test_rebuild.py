"""Layers of a lost file, made of those beside them: each element beside a mean taken by hand, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import CheckpointError, DamageError
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.restore import RestoreReport, restore
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from support.checkpoint_worlds import together

STAGES = [[0, 1], [2, 3], [4, 5]]
"""Layers of each of three stages, and so of each rank."""
SHAPES = {"attention.weight": (6, 4), "norm.weight": (4,)}
Arrays = dict[str, torch.Tensor]


def model(roles: tuple[str, ...] = ("weight", "exp_avg", "exp_avg_sq"), layers: int = 6) -> Arrays:
    """Arrays by key. Their gradients are larger in each layer than in the one before."""
    draw = torch.Generator().manual_seed(3)
    found: Arrays = {}
    for role in roles:
        for name in ("embedding.weight", "head.weight"):
            found[f"{role}/{name}"] = torch.randn(8, 4, generator=draw, dtype=torch.float64)
        for layer in range(layers):
            for name, shape in SHAPES.items():
                values = torch.randn(shape, generator=draw, dtype=torch.float64)
                found[f"{role}/layers.{layer}.{name}"] = values**2 * (layer + 1) if role == "exp_avg_sq" else values
    return found


def stage_of(key: str, stages: list[list[int]]) -> int:
    name = key.partition("/")[2]
    if not name.startswith("layers"):
        return 0 if name.startswith("embedding") else len(stages) - 1
    return next(number for number, layers in enumerate(stages) if int(name.split(".")[1]) in layers)


def fragment(key: str, tensor: torch.Tensor, box: Box | None = None) -> Fragment:
    role, _, name = key.partition("/")
    box = box or Box.whole(tuple(tensor.shape))
    return Fragment(name, role, tuple(tensor.shape), box, tensor[box.slices()].clone())


def save(folder: Path, arrays: Arrays, stages: list[list[int]] = STAGES, files: str = "rank") -> Path:
    def body(control: Control) -> None:
        checkpointer = Checkpointer(folder, control, CheckpointConfig(mode="sync", timeout=60, files=files))
        mine = [fragment(key, each) for key, each in arrays.items() if stage_of(key, stages) == control.rank]
        checkpointer.save(7, mine, {})
        checkpointer.finish()

    together(len(stages), body)
    return folder / "step-00000007"


def load(step: Path, shapes: Mapping[str, torch.Tensor], *, rebuild: bool = True) -> tuple[Arrays, RestoreReport]:
    """Restore on two ranks, each of which holds half of the rows of every array."""
    blank = {key: torch.full_like(each, torch.nan) for key, each in shapes.items()}
    rows = {key: len(each) // 2 for key, each in blank.items()}
    ranks = [
        [fragment(key, each, Box.whole(tuple(each.shape)).cut(0, rank * rows[key], rows[key])) for key, each in blank.items()]
        for rank in range(2)
    ]
    reports: dict[int, RestoreReport] = {}

    def body(control: Control) -> None:
        reports[control.rank] = restore(step, ranks[control.rank], control, rebuild=rebuild)

    together(2, body)
    assert reports[0].rebuilt == reports[1].rebuilt
    return {one.key: torch.cat([one.tensor, two.tensor]) for one, two in zip(*ranks, strict=True)}, reports[0]


def flip(file: Path, at: int = -3) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "flipped", "without digests", "flipped in a host's file"])
def test_a_lost_stage_is_the_mean_of_those_beside_it(tmp_path: Path, how: str) -> None:
    """Weighted by the sums of second moments of each stage; first moments begin at zero, and all else is as it was."""
    arrays = model()
    step = save(tmp_path, arrays, files="host" if "host" in how else "rank")
    file = step / "rank-00001.safetensors"
    if "host" in how:
        own = load_manifest(open_files(step)).files[1]
        flip(step / own.name, own.start + own.bytes - 3)
    elif how == "flipped":
        flip(file)
    else:
        (file if how == "missing" else step / "rank-00001.leaves").unlink()
    found, report = load(step, arrays)
    before, behind = (
        sum(float(arrays[f"exp_avg_sq/layers.{layer}.{name}"].sum()) for layer in layers for name in SHAPES)
        for layers in (STAGES[0], STAGES[2])
    )
    expected = dict(arrays)
    for layer in (2, 3):
        for name in SHAPES:
            expected[f"exp_avg/layers.{layer}.{name}"] = torch.zeros(SHAPES[name], dtype=torch.float64)
            for role in ("weight", "exp_avg_sq"):
                one, two = arrays[f"{role}/layers.{layer - 2}.{name}"], arrays[f"{role}/layers.{layer + 2}.{name}"]
                expected[f"{role}/layers.{layer}.{name}"] = (before * one + behind * two) / (before + behind)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-14, atol=0)
    (layers,) = report.rebuilt
    assert (layers.lost, layers.before, layers.behind) == ([2, 3], [0, 1], [4, 5])
    assert layers.shares == pytest.approx([before / (before + behind), behind / (before + behind)])
    assert len(report.damage) == 1 and ("segment of rank 1" if "host" in how else "rank-00001") in report.damage[0]


def test_without_second_moments_the_shares_are_halves(tmp_path: Path) -> None:
    arrays = model(("weight", "momentum"))
    step = save(tmp_path, arrays)
    (step / "rank-00001.safetensors").unlink()
    found, report = load(step, arrays)
    mean = (arrays["weight/layers.1.norm.weight"] + arrays["weight/layers.5.norm.weight"]) / 2
    torch.testing.assert_close(found["weight/layers.3.norm.weight"], mean, rtol=1e-15, atol=0)
    assert not found["momentum/layers.3.norm.weight"].any() and "no second moments" in report.rebuilt[0].by


def test_the_outermost_layer_stands_for_those_beyond_it(tmp_path: Path) -> None:
    """Where the stage beside is shorter than the lost one."""
    arrays = {key: each for key, each in model().items() if "layers.5" not in key}
    step = save(tmp_path, arrays)
    (step / "rank-00001.safetensors").unlink()
    _, report = load(step, arrays)
    assert (report.rebuilt[0].before, report.rebuilt[0].behind) == ([0, 1], [4, 4])


def test_two_stages_that_are_lost_are_rebuilt_from_what_is_left(tmp_path: Path) -> None:
    arrays = model()
    step = save(tmp_path, arrays, [[0], [1], [2], [3, 4], [5]])
    for rank in (1, 3):
        (step / f"rank-{rank:05d}.safetensors").unlink()
    found, report = load(step, arrays)
    one, two = report.rebuilt
    assert ((one.lost, one.before, one.behind), (two.lost, two.before, two.behind)) == (
        ([1], [0], [2]),
        ([3, 4], [2, 2], [5, 5]),
    )
    for block, layer in ((one, 1), (two, 4)):
        left, right = (arrays[f"weight/layers.{each[-1]}.norm.weight"] for each in (block.before, block.behind))
        mean = block.shares[0] * left + block.shares[1] * right
        torch.testing.assert_close(found[f"weight/layers.{layer}.norm.weight"], mean, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("rank", "roles", "message"),
    [
        (0, ("weight",), "weight/embedding.weight is of no layer.*layers.0 has no layer before it"),
        (2, ("weight",), "weight/head.weight is of no layer.*layers.4 has no layer behind it"),
        (1, ("weight", "scales"), "scales/layers.2.attention.weight is state of a kind that is not rebuilt"),
    ],
)
def test_what_has_no_neighbours_is_refused_by_name(tmp_path: Path, rank: int, roles: tuple[str, ...], message: str) -> None:
    arrays = model(roles)
    step = save(tmp_path, arrays)
    (step / f"rank-{rank:05d}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=message):
        load(step, arrays)


def test_layers_of_another_kind_replace_none(tmp_path: Path) -> None:
    arrays = model(("weight",))
    arrays["weight/layers.4.attention.weight"] = torch.zeros(2, 4, dtype=torch.float64)
    step = save(tmp_path, arrays)
    (step / "rank-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weight/layers.4.attention.weight is not like it"):
        load(step, arrays)


def test_nothing_is_rebuilt_unasked_nor_where_nothing_is_lost(tmp_path: Path) -> None:
    arrays = model()
    step = save(tmp_path, arrays)
    found, report = load(step, arrays)
    assert not report.rebuilt and all(torch.equal(found[key], each) for key, each in arrays.items())
    (step / "rank-00001.safetensors").unlink()
    with pytest.raises(DamageError, match="rank-00001"):
        load(step, arrays, rebuild=False)
    (step / "manifest.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="the manifest is cut off"):
        load(step, arrays)
