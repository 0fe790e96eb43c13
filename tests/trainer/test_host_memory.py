"""Host memory that a run takes, beside what there is: refused by key before it is taken, or warned of."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshloom.launch.cli import main
from meshloom.trainer import host_memory
from meshloom.trainer.host_memory import host_bytes, host_memory_problems, host_memory_warning
from support.configs import config_of
from support.tiny_run import TINY

LLAMA = ("recipe=llama_1b", "batch.micro=1", "trainer.activation=none", "batch.samples=4", "precision=fp32")
PARAMETERS = 1_498_482_688  # 2 · 128,256 · 2,048 + 16 · (2 · 2,048² + 2 · 2,048 · 512 + 3 · 2,048 · 8,192 + 2 · 2,048) + 2,048


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "visible_gpus", lambda: 0)


def test_the_state_in_fp32_is_sixteen_bytes_a_parameter() -> None:
    """Weights and gradients of 4 bytes, AdamW's moments of 8, once for each copy: closed forms (ZeRO, arXiv 1910.02054)."""
    for copies, words in ((1, ["launch.nproc=1"]), (2, ["launch.nproc=2", "parallel.zero=0"]), (1, ["launch.nproc=2"])):
        config = config_of(*LLAMA, *words, *([] if copies == 2 else ["parallel.zero=3"]))
        found = host_bytes(config)
        assert found is not None and found.state == pytest.approx(16 * copies * PARAMETERS, rel=1e-3)
        assert found.planned > found.state


def test_a_pipeline_is_counted_as_all_of_its_stages() -> None:
    whole, cut = (host_bytes(config_of(*LLAMA, *words)) for words in (["launch.nproc=1"], ["launch.nproc=4", "parallel.pp=4"]))
    assert whole is not None and cut is not None and cut.state == pytest.approx(whole.state, rel=1e-3)
    nodes = host_bytes(config_of(*LLAMA, "launch.nproc=2", "launch.nodes=2", "parallel.pp=4"))
    assert nodes is not None and nodes.state < cut.state / 2, "the least that two stages hold: which they are is not known yet"


def test_it_is_refused_or_warned_of_at_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(*LLAMA, "launch.nproc=1")
    found = host_bytes(config)
    assert found is not None
    for free, refused, warned in (
        (found.state - 1, True, False),
        (found.state, False, True),
        (found.planned - 1, False, True),
        (found.planned, False, False),
    ):
        monkeypatch.setattr(host_memory, "available_memory", lambda free=free: free)
        problems = host_memory_problems(config)
        assert ([problem.key for problem in problems], bool(host_memory_warning(config))) == (["model"] * refused, warned)
    monkeypatch.setattr(host_memory, "available_memory", lambda: 2**30)
    told = str(host_memory_problems(config)[0])
    assert "22.3 GiB in 1 process, where 1.00 GiB are available" in told and "train on GPUs" in told


def test_beside_gpus_only_what_is_offloaded_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "visible_gpus", lambda: 2)
    monkeypatch.setattr(host_memory, "available_memory", lambda: 2**30)
    assert host_memory_problems(config_of(*LLAMA, "launch.nproc=2")) == []
    (problem,) = host_memory_problems(config_of(*LLAMA, "launch.nproc=2", "parallel.offload=cpu"))
    assert problem.key == "parallel.offload"


def test_a_model_of_unknown_costs_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_memory", lambda: 0)
    own = "model={_target_: my.GPT, layers: 2}"
    assert host_bytes(config_of("recipe=quickstart", "data=synthetic", own)) is None


def test_train_refuses_it_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host_memory, "available_memory", lambda: 10)
    folder = tmp_path / "run"
    for switches in ([], ["-m"]):
        assert main(["train", *switches, *TINY, "launch.nproc=1", f"output_dir={folder}"]) == 2
        assert "model: no GPU is visible, and weights, gradients and optimizer state take" in capsys.readouterr().err
    assert not folder.exists()
