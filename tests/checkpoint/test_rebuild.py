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
from meshloom.checkpoint.rebuild import KindOf
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


def save(
    folder: Path,
    arrays: Arrays,
    stages: list[list[int]] = STAGES,
    files: str = "rank",
    copies: int = 1,
    *,
    sharded: bool = False,
) -> Path:
    """Save on a rank for each stage, or on several, each with copies of the stage's arrays or with a share of their rows."""

    def body(control: Control) -> None:
        checkpointer = Checkpointer(folder, control, CheckpointConfig(mode="sync", timeout=60, files=files))
        stage, number = divmod(control.rank, copies)
        mine: list[Fragment] = []
        for key, each in arrays.items():
            rows, whole = len(each) // copies, Box.whole(tuple(each.shape))
            if stage_of(key, stages) == stage:
                mine.append(fragment(key, each, whole.cut(0, number * rows, rows) if sharded else whole))
        checkpointer.save(7, mine, {})
        checkpointer.finish()

    together(len(stages) * copies, body)
    return folder / "step-00000007"


def full(_: int) -> str:
    return "full"


def load(
    step: Path, shapes: Mapping[str, torch.Tensor], rebuild: KindOf | None = full, *, strict: bool = True
) -> tuple[Arrays, RestoreReport]:
    """Restore on two ranks, each of which holds half of the rows of every array."""
    blank = {key: torch.full_like(each, torch.nan) for key, each in shapes.items()}
    rows = {key: len(each) // 2 for key, each in blank.items()}
    ranks = [
        [fragment(key, each, Box.whole(tuple(each.shape)).cut(0, rank * rows[key], rows[key])) for key, each in blank.items()]
        for rank in range(2)
    ]
    reports: dict[int, RestoreReport] = {}

    def body(control: Control) -> None:
        reports[control.rank] = restore(step, ranks[control.rank], control, rebuild=rebuild, strict=strict)

    together(2, body)
    assert reports[0].rebuilt == reports[1].rebuilt
    return {one.key: torch.cat([one.tensor, two.tensor]) for one, two in zip(*ranks, strict=True)}, reports[0]


def flip(file: Path, at: int = -3) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_lost_stage_is_the_mean_of_those_beside_it(tmp_path: Path) -> None:
    """Weighted by the sums of second moments of each stage; first moments begin at zero, and all else is as it was."""
    arrays = model()
    step = save(tmp_path, arrays)
    (step / "rank-00001.safetensors").unlink()
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
    assert len(report.damage) == 1 and "rank-00001.safetensors: the file is missing" in report.damage[0]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("flipped", r"rank-00001.safetensors, block 0: .* \(1 of 1 blocks\)"),
        ("cut off", r"rank-00001.safetensors: the file has \d+ bytes, not"),
        ("without digests", r"rank-00001.leaves: the file is missing, but the data are whole"),
        ("flipped in a host's file", r"segment of rank 1, block 0: its bytes do not match"),
    ],
)
def test_a_file_that_is_there_is_not_replaced(tmp_path: Path, how: str, message: str) -> None:
    """It is refused, and the message says what is damaged and what is whole. Moved out of the step, it counts as lost."""
    arrays = model()
    step = save(tmp_path, arrays, files="host" if "host" in how else "rank")
    file = step / "rank-00001.safetensors"
    if "host" in how:
        own = load_manifest(open_files(step)).files[1]
        flip(step / own.name, own.start + own.bytes - 3)
    elif how == "flipped":
        flip(file)
    elif how == "cut off":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        (step / "rank-00001.leaves").unlink()
    with pytest.raises(CheckpointError, match=f"{message}.*replaces no file that is there.*move such files out of"):
        load(step, arrays)
    if "host" not in how:
        file.unlink()
        _, report = load(step, arrays)
        assert report.rebuilt[0].lost == [2, 3]


@pytest.mark.parametrize(("ranks", "lost"), [(2, 1), (16, 8)])
def test_parts_of_layers_are_not_replaced_without_a_pipeline(tmp_path: Path, ranks: int, lost: int) -> None:
    """Ranks with copies deal the arrays out among them: a file has one weight of a layer, and a moment of another."""
    arrays = model()
    step = save(tmp_path, arrays, [list(range(6))], copies=ranks)
    (step / f"rank-{lost:05d}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"layers.\d is lost only in part: files that are there have|is of no layer"):
        load(step, arrays)


@pytest.mark.parametrize(("copies", "sharded"), [(4, False), (2, True)])
def test_the_other_ranks_of_a_stage_keep_what_they_have(tmp_path: Path, copies: int, sharded: bool) -> None:
    """A pipeline of three stages on several ranks each, with copies or with shares of each array. First one of them is lost."""
    arrays = model()
    step = save(tmp_path, arrays, copies=copies, sharded=sharded)
    first, *others = range(copies, 2 * copies)
    (step / f"rank-{first:05d}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"layers.[23] is lost only in part"):
        load(step, arrays)
    for rank in others:
        (step / f"rank-{rank:05d}.safetensors").unlink()
    _, report = load(step, arrays)
    assert (report.rebuilt[0].lost, report.rebuilt[0].before, report.rebuilt[0].behind) == ([2, 3], [0, 1], [4, 5])


@pytest.mark.parametrize("momentum", ["momentum", "momentum_buffer"])
def test_without_second_moments_the_shares_are_halves(tmp_path: Path, momentum: str) -> None:
    arrays = model(("weight", momentum))
    step = save(tmp_path, arrays)
    (step / "rank-00001.safetensors").unlink()
    found, report = load(step, arrays)
    mean = (arrays["weight/layers.1.norm.weight"] + arrays["weight/layers.5.norm.weight"]) / 2
    torch.testing.assert_close(found["weight/layers.3.norm.weight"], mean, rtol=1e-15, atol=0)
    assert not found[f"{momentum}/layers.3.norm.weight"].any() and "no second moments" in report.rebuilt[0].by


def test_the_outermost_layer_stands_for_those_beyond_it(tmp_path: Path) -> None:
    """A stage beside may be shorter than the lost one. Its layer counts twice, so equal moments give equal shares."""
    arrays = {key: each for key, each in model().items() if "layers.5" not in key}
    arrays |= {key: torch.ones_like(each) for key, each in arrays.items() if key.startswith("exp_avg_sq")}
    step = save(tmp_path, arrays)
    (step / "rank-00001.safetensors").unlink()
    _, report = load(step, arrays)
    assert (report.rebuilt[0].before, report.rebuilt[0].behind) == ([0, 1], [4, 4])
    assert report.rebuilt[0].shares == [0.5, 0.5] and report.rebuilt[0].by == "second moments"


def test_layers_are_made_of_those_of_their_kind(tmp_path: Path) -> None:
    """The place beside has a layer of another kind, so the nearest of the same is taken; without any it is refused."""
    arrays = model()
    step = save(tmp_path, arrays, [[0, 1], [2], [3, 4, 5]])
    (step / "rank-00001.safetensors").unlink()
    found, report = load(step, arrays, lambda layer: "sliding" if layer in (1, 3) else "full")
    (layers,) = report.rebuilt
    assert (layers.lost, layers.before, layers.behind) == ([2], [0], [4])
    mean = sum(share * arrays[f"weight/layers.{layer}.norm.weight"] for share, layer in zip(layers.shares, (0, 4), strict=True))
    torch.testing.assert_close(found["weight/layers.2.norm.weight"], mean, rtol=1e-14, atol=0)
    with pytest.raises(CheckpointError, match=r"layers.2 has no layer of its kind \(sliding\) before it"):
        load(step, arrays, lambda layer: "sliding" if layer in (2, 3) else "full")


def test_state_that_nobody_wants_need_not_be_rebuilt(tmp_path: Path) -> None:
    """Another optimizer reads the weights alone: state of a kind that is not known is in nobody's way."""
    arrays = model(("weight", "scales"))
    step = save(tmp_path, arrays)
    (step / "rank-00001.safetensors").unlink()
    weights = {key: each for key, each in arrays.items() if key.startswith("weight")}
    found, _ = load(step, weights, strict=False)
    mean = (arrays["weight/layers.0.norm.weight"] + arrays["weight/layers.4.norm.weight"]) / 2
    torch.testing.assert_close(found["weight/layers.2.norm.weight"], mean, rtol=1e-15, atol=0)


def test_a_fault_of_the_one_that_plans_reaches_all(tmp_path: Path) -> None:
    arrays = model()
    step = save(tmp_path, arrays)
    (step / "rank-00001.safetensors").unlink()

    def fail(layer: int) -> str:
        raise ZeroDivisionError(f"layer {layer}")

    faults: dict[int, str] = {}

    def body(control: Control) -> None:
        try:
            restore(step, [fragment(key, each) for key, each in arrays.items()], control, rebuild=fail, timeout=20)
        except (CheckpointError, ZeroDivisionError) as error:
            faults[control.rank] = str(error)

    together(2, body)
    assert "layer" in faults[0] and "planning what replaces lost layers failed: ZeroDivisionError: layer" in faults[1]


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
        (0, ("weight",), "weight/embedding.weight is of no layer.*layers.0 has no layer of its kind .* before it"),
        (2, ("weight",), "weight/head.weight is of no layer.*layers.4 has no layer of its kind .* behind it"),
        (1, ("weight", "scales"), "scales/layers.2.attention.weight is state of a kind that is not rebuilt"),
    ],
)
def test_layers_without_neighbours_are_refused_by_name(tmp_path: Path, rank: int, roles: tuple[str, ...], message: str) -> None:
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
        load(step, arrays, None)
    (step / "manifest.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="the manifest is cut off"):
        load(step, arrays)
