"""One attention kernel for all ranks, measured once and then remembered."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.config.parallel import ParallelConfig
from meshloom.models import attention_kernels
from meshloom.models.attention_choice import Shape
from meshloom.models.llama import Llama
from meshloom.parallel import attention_kernel
from meshloom.parallel.attention_kernel import choose_attention, read_record, record_path, remember, shape_of
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from ranks import run_ranks

FASTER = [{"cudnn": 1.0, "flash": 3.0, "flash4": math.inf}, {"cudnn": 4.0, "flash": 1.0, "flash4": math.inf}]
"""By rank: alone, the first would take cudnn; together they take flash."""


def chosen(rank: int, world_size: int, folder: str, runs: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """By run: the kernel, and how often one was timed. A run may have its own times, length, machine and packages."""
    mesh = Mesh.connect(Layout.plan(ParallelConfig(), world_size), torch.device("cpu"))
    with torch.device("meta"):
        model = Llama(dim=64, layers=1, heads=4, kv_heads=2, ffn_dim=64, vocabulary=16)
    found: list[tuple[str, int]] = []
    for run in runs:
        timed: list[str] = []

        def seconds(kernel: str, *_: Any, run: dict[str, Any] = run, timed: list[str] = timed) -> float:
            timed.append(kernel)
            return run.get("times", FASTER)[rank][kernel]

        with pytest.MonkeyPatch.context() as patch:
            # Each rank has a folder of its own, as on machines that share no disk: the main one's counts.
            patch.setenv("MESHLOOM_CACHE", f"{folder}/{rank}")
            patch.setattr(attention_kernel, "seconds", seconds)
            patch.setattr(attention_kernel, "machine", lambda run=run: run.get("machine", "H200"))
            without = run.get("without", (0, 1))  # ranks that have no FlashAttention 4
            patch.setattr(
                attention_kernel, "why_not", lambda kernel, who=without: "x" if kernel == "flash4" and rank in who else None
            )
            choose_attention(model, mesh, ParallelConfig(), run.get("seq_len", 128))
        found.append((attention_kernels.dense_kernel, len(timed)))
    return found


def test_all_ranks_take_what_is_fastest_together_and_remember_it(tmp_path: Path) -> None:
    later = [{"cudnn": 1.0, "flash": 9.0, "flash4": math.inf}] * 2
    runs: list[dict[str, Any]] = [{}, {"times": later}, {"times": later, "seq_len": 256}, {"times": later, "machine": "H100"}]
    expected = [("flash", 3), ("flash", 0), ("cudnn", 3), ("cudnn", 3)]
    assert run_ranks(2, chosen, str(tmp_path), runs) == [expected, expected]
    assert not (tmp_path / "1").exists()
    record = json.loads((tmp_path / "0" / "attention.json").read_text(encoding="utf-8"))
    assert [times["cudnn"] for times in record.values()] == [2.5, 1.0, 1.0]
    assert all(times["flash4"] is None for times in record.values())
    one = run_ranks(1, chosen, str(tmp_path), [{"times": later}])
    assert one == [[("cudnn", 3)]], "on another number of processes they measure again"


def test_a_kernel_that_a_rank_has_no_more_is_not_taken_from_memory(tmp_path: Path) -> None:
    had = [{"cudnn": 1.0, "flash": 2.0, "flash4": 0.5}] * 2
    has = [{"cudnn": 1.0, "flash": 2.0, "flash4": math.inf}] * 2
    expected = [("flash4", 3), ("flash4", 0), ("cudnn", 3), ("cudnn", 3), ("flash4", 0)]
    everywhere: dict[str, Any] = {"times": had, "without": ()}
    lost: dict[str, Any] = {"times": has, "without": (1,)}
    runs = [everywhere, {"times": has, "without": ()}, lost, lost, everywhere]
    assert run_ranks(2, chosen, str(tmp_path), runs) == [expected, expected]


def test_a_kernel_that_failed_for_once_is_tried_again(tmp_path: Path) -> None:
    failed: dict[str, Any] = {
        "times": [{"cudnn": 1.0, "flash": 2.0, "flash4": 0.5}, {"cudnn": 1.0, "flash": 2.0, "flash4": math.inf}]
    }
    well: dict[str, Any] = {"times": [{"cudnn": 1.0, "flash": 2.0, "flash4": 0.5}] * 2}
    runs = [{**failed, "without": ()}, {**well, "without": ()}, {**failed, "without": ()}]
    assert run_ranks(2, chosen, str(tmp_path), runs) == [[("cudnn", 3), ("flash4", 3), ("flash4", 0)]] * 2


@pytest.mark.parametrize(
    ("parallel", "seq_len", "shape"),
    [
        (ParallelConfig(), 8192, Shape(8192, 32, 8, 128)),
        (ParallelConfig(tp=16), 8192, Shape(8192, 2, 1, 128)),
        (ParallelConfig(cp=4), 32_768, Shape(8192, 32, 8, 128)),
        (ParallelConfig(cp=4, tp=2, cp_kind="ulysses"), 12_288, Shape(12_288, 4, 1, 128)),
        (ParallelConfig(), 1_000_000, Shape(16_384, 32, 8, 128)),
    ],
)
def test_what_is_timed_is_what_a_rank_computes(parallel: ParallelConfig, seq_len: int, shape: Shape) -> None:
    with torch.device("meta"):
        model = Llama(dim=4096, layers=1, heads=32, kv_heads=8, ffn_dim=64, vocabulary=16)
    assert shape_of(model, parallel, seq_len) == shape


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"H200": {"cudnn": 1}}', '{"H200": {"cudnn": "fast"}}', '{"H200": 3}'])
def test_a_broken_record_is_none_and_is_replaced(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHLOOM_CACHE", str(tmp_path))
    record_path().write_text(content)
    assert read_record(record_path()) == {}
    times = {"cudnn": 1.0, "flash": 2.0, "flash4": math.inf}
    remember(record_path(), "work", times)  # type: ignore[arg-type]
    assert read_record(record_path()) == {"work": times}
    assert list(tmp_path.iterdir()) == [record_path()]


def test_a_run_does_not_need_a_folder_to_remember_in(tmp_path: Path) -> None:
    (tmp_path / "0").write_text("a file where the folder would be")
    assert run_ranks(1, chosen, str(tmp_path), [{}, {}]) == [[("cudnn", 3), ("cudnn", 3)]]


def test_times_are_of_a_gpu_and_of_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert attention_kernel.machine().startswith(f"NVIDIA H200, torch {torch.__version__}, cuDNN ")
