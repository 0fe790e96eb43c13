"""`meshloom checkpoint …`: what it prints and, for scripts, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.launch.checkpoint import main
from support.checkpoint_worlds import fragments, make_arrays


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with steps 1 and 2, of which 2 differs in one array."""
    arrays = make_arrays(0, large=True)
    checkpointer = Checkpointer(tmp_path / "checkpoints", Control.alone(), CheckpointConfig(mode="sync", keep=0))
    checkpointer.save(1, fragments(arrays, 1, 0)[0], {"config": {"seed": 1}})
    arrays["weight/norm.weight"][3] += 0.5
    checkpointer.save(2, fragments(arrays, 1, 0)[0], {"config": {"seed": 1}})
    checkpointer.finish()
    return tmp_path


def step(run: Path, number: int) -> Path:
    return run / f"checkpoints/step-{number:08d}"


def test_verify_is_zero_only_if_every_block_checks(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert main(["verify", str(step(run, 1))]) == 0
    good = (step(run, 2) / "rank-00000.safetensors").read_bytes()
    # One bit in the header's length, its text, its padding, the middle and the last byte; each is found and its block named.
    for at in (0, 20, 15_000, len(good) // 2, 17 * 2**20, len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 16
        (step(run, 2) / "rank-00000.safetensors").write_bytes(bad)
        capsys.readouterr()
        assert main(["verify", str(step(run, 2))]) == 1
        assert f"rank-00000.safetensors, block {at // 2**24}" in capsys.readouterr().out
        assert main(["verify", str(run)]) == 1
    (step(run, 2) / "rank-00000.safetensors").write_bytes(good)
    assert main(["verify", str(step(run, 2))]) == 0
    leaves = bytearray((step(run, 2) / "rank-00000.leaves").read_bytes())
    leaves[-1] ^= 1
    (step(run, 2) / "rank-00000.leaves").write_bytes(leaves)
    assert main(["verify", str(step(run, 2))]) == 1


def test_verify_of_nothing_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    assert "no checkpoint here" in capsys.readouterr().err
    (tmp_path / "step-00000003").mkdir()
    assert main(["verify", str(tmp_path / "step-00000003")]) == 1


def test_list_and_inspect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["2", "1"]
    assert main(["inspect", str(step(run, 1)), "--arrays"]) == 0
    assert "momentum/layers.0.ffn.w1.weight  BF16[64, 24]" in capsys.readouterr().out
    assert main(["inspect", str(run), "--state"]) == 0
    assert json.loads(capsys.readouterr().out) == {"config": {"seed": 1}}
    (step(run, 2) / "rank-00000.leaves").unlink()
    assert main(["list", str(run)]) == 1


def test_diff_names_the_arrays_and_the_largest_difference(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(step(run, 1)), str(step(run, 1))]) == 0
    capsys.readouterr()
    assert main(["diff", str(step(run, 1)), str(step(run, 2))]) == 1
    out = capsys.readouterr().out
    assert "weight/norm.weight" in out
    assert "1 elements, by up to 0.5" in out
    assert "1 arrays differ" in out


def test_prune_and_stats(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(run)]) == 0
    assert capsys.readouterr().out.count("committed") == 2
    assert main(["prune", str(run / "checkpoints"), "--keep", "0"]) == 1
    assert main(["prune", str(step(run, 2)), "--keep", "1"]) == 1
    assert main(["prune", str(run.parent / "nowhere"), "--keep", "1"]) == 1
    assert not (run.parent / "nowhere").exists() and step(run, 1).exists()
    assert main(["prune", str(run), "--keep", "1"]) == 0  # a run's folder does, as for the other commands
    assert capsys.readouterr().out == "deleted step-00000001\n"
    assert not step(run, 1).exists()
    assert step(run, 2).exists()


def test_stats_of_a_log_that_a_crash_cut_off(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = run / "checkpoints/saves.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "outc')
    checkpointer = Checkpointer(run / "checkpoints", Control.alone(), CheckpointConfig(mode="sync", keep=0))
    checkpointer.save(4, fragments(make_arrays(), 1, 0)[0], {})
    checkpointer.finish()
    assert main(["stats", str(run)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", "1", "2", "4"]


def test_misuse_is_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["frobnicate"]) == 2
    assert main(["--help"]) == 0
    capsys.readouterr()


def test_diff_of_nan_and_of_other_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, value in ((1, torch.tensor([1.0, float("nan")])), (2, torch.tensor([1.0, 2.0])), (3, torch.ones(3))):
        checkpointer = Checkpointer(tmp_path, Control.alone(), CheckpointConfig(mode="sync", keep=0))
        checkpointer.save(number, fragments({"weight/w": value}, 1, 0)[0], {})
        checkpointer.finish()
    folders = [str(tmp_path / f"step-0000000{number}") for number in (1, 2, 3)]
    assert main(["diff", folders[0], folders[0]]) == 0
    assert main(["diff", folders[0], folders[1]]) == 1
    assert "by up to inf" in capsys.readouterr().out
    assert main(["diff", folders[0], folders[2]]) == 1
    assert "F32[2] became F32[3]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["list"], ["inspect"], ["verify"], ["stats"], ["prune", "--keep", "1"], ["diff", "elsewhere"], ["export", "out"]]
)
def test_an_address_that_nothing_here_can_read_is_a_message(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([words[0], "nosuch://bucket/run", *words[1:]]) == 1
    assert capsys.readouterr().err.startswith(f"meshloom checkpoint {words[0]}: nosuch://bucket/run: ")


def test_lines_of_somebody_else_among_the_saves_are_counted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "checkpoints" / "saves.jsonl").open("a") as file:
        file.write('{"step": 3}\n[1]\n')
    assert main(["stats", str(run)]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("committed") == 2 and printed.err == "meshloom checkpoint stats: 2 lines are none of a save\n"
