"""One attention kernel for all ranks, measured once and then remembered."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.kernels.attention_blocks import Kernel
from meshloom.kernels.attention_timing import Shape, unsupported_reason
from meshloom.models.config import DecoderConfig
from meshloom.parallel import attention_choice
from meshloom.parallel.attention_choice import (
    choose_attention,
    read_record,
    record_path,
    remember,
    ring_kernel_problems,
    shape_of,
    windows_of,
)
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from support.ranks import run_ranks

FASTER = [{"cudnn": 1.0, "flash": 3.0}, {"cudnn": 4.0, "flash": 1.0}]
"""By rank: alone, the first would take cudnn; together they take flash."""


def chosen(rank: int, world_size: int, folder: str, runs: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """By run: the kernel, and how often one was timed. A run may have its own times, length, machine and packages."""
    mesh = Mesh.connect(Layout.plan(ParallelConfig(), world_size), torch.device("cpu"))
    model = DecoderConfig(dim=64, layers=1, heads=4, kv_heads=2, ffn_dim=64, vocabulary=16)
    found: list[tuple[str, int]] = []
    for run in runs:
        timed: list[str] = []

        def seconds(kernel: str, *_: Any, run: dict[str, Any] = run, timed: list[str] = timed) -> float:
            timed.append(kernel)
            return run.get("times", FASTER)[rank][kernel]

        with pytest.MonkeyPatch.context() as patch:
            # Each rank has a folder of its own, as on machines that share no disk: the main one's counts.
            patch.setenv("MESHLOOM_CACHE", f"{folder}/{rank}")
            patch.setattr(attention_choice, "seconds", seconds)
            patch.setattr(attention_choice, "machine", lambda run=run: run.get("machine", "H200"))
            without = run.get("without", (0, 1))  # ranks that have no FlashAttention 4
            lacks = run.get("refused", ())  # kernels that don't take the shape, on any rank

            def unsupported(kernel: str, *_: Any, without: Any = without, lacks: Any = lacks) -> str | None:
                return "x" if kernel in lacks or (kernel == "flash4" and rank in without) else None

            patch.setattr(attention_choice, "unsupported_reason", unsupported)
            kernel = choose_attention(model, mesh, ParallelConfig(), run.get("seq_len", 128))
        found.append((kernel, len(timed)))
    return found


def test_all_ranks_take_what_is_fastest_together_and_remember_it(tmp_path: Path) -> None:
    later = [{"cudnn": 1.0, "flash": 9.0}] * 2
    runs: list[dict[str, Any]] = [{}, {"times": later}, {"times": later, "seq_len": 256}, {"times": later, "machine": "H100"}]
    expected = [("flash", 2), ("flash", 0), ("cudnn", 2), ("cudnn", 2)]
    assert run_ranks(2, chosen, str(tmp_path), runs) == [expected, expected]
    assert not (tmp_path / "1").exists()
    record = json.loads((tmp_path / "0" / "attention.json").read_text(encoding="utf-8"))
    assert list(record.values()) == [{"cudnn": 2.5, "flash": 2.0}, *[{"cudnn": 1.0, "flash": 9.0}] * 2]
    one = run_ranks(1, chosen, str(tmp_path), [{"times": later}])
    assert one == [[("cudnn", 2)]], "on another number of processes they measure again"


def test_kernel_missing_on_a_rank_is_not_timed_nor_remembered(tmp_path: Path) -> None:
    everywhere: dict[str, Any] = {"times": [{"cudnn": 1.0, "flash": 2.0, "flash4": 0.5}] * 2, "without": ()}
    lost: dict[str, Any] = {"times": [{}, {}], "without": (1,)}
    runs = [everywhere, everywhere, lost, lost, everywhere]
    expected = [("flash4", 3), ("flash4", 0), ("cudnn", 0), ("cudnn", 0), ("flash4", 0)]
    assert run_ranks(2, chosen, str(tmp_path), runs) == [expected, expected]


def test_a_remembered_kernel_is_compiled_where_it_is_not_yet(tmp_path: Path) -> None:
    run: dict[str, Any] = {"times": [{"cudnn": 1.0, "flash": 2.0, "flash4": 0.5}] * 2, "without": ()}
    assert run_ranks(2, chosen, str(tmp_path), [run]) == [[("flash4", 3)]] * 2
    shutil.rmtree(tmp_path / "1")  # a machine that joins
    assert run_ranks(2, chosen, str(tmp_path), [run]) == [[("flash4", 0)]] * 2
    assert len(list((tmp_path / "1" / "compiled").iterdir())) == 2


def test_kernel_that_refuses_the_shape_does_not_block_memory(tmp_path: Path) -> None:
    times = [{"flash": 2.0}] * 2
    refusing: dict[str, Any] = {"times": times, "refused": ("cudnn", "flash4"), "without": ()}
    assert (
        run_ranks(2, chosen, str(tmp_path), [refusing, {**refusing, "times": [{}, {}]}]) == [[("flash", 1), ("flash", 0)]] * 2
    )


def test_nothing_is_timed_where_no_kernel_takes_the_shape(tmp_path: Path) -> None:
    refusing: dict[str, Any] = {"times": [{}], "refused": ("cudnn", "flash", "flash4")}
    assert run_ranks(1, chosen, str(tmp_path), [refusing]) == [[("cudnn", 0)]]
    assert not (tmp_path / "0").exists()


def test_only_a_kernel_that_failed_is_tried_again(tmp_path: Path) -> None:
    failed: dict[str, Any] = {
        "times": [{"cudnn": 1.0, "flash": 2.0, "flash4": 0.5}, {"cudnn": 1.0, "flash": 2.0, "flash4": math.inf}]
    }
    again: dict[str, Any] = {"times": [{"flash4": math.inf}] * 2}  # nothing else may be timed
    well: dict[str, Any] = {"times": [{"flash4": 0.5}] * 2}
    runs = [{**run, "without": ()} for run in (failed, again, well, failed)]
    assert run_ranks(2, chosen, str(tmp_path), runs) == [[("cudnn", 3), ("cudnn", 1), ("flash4", 1), ("flash4", 0)]] * 2


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
def test_timed_shapes_are_those_that_a_rank_computes(parallel: ParallelConfig, seq_len: int, shape: Shape) -> None:
    model = DecoderConfig(dim=4096, layers=1, heads=32, kv_heads=8, ffn_dim=64, vocabulary=16)
    assert shape_of(model, parallel, seq_len) == shape


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"H200": 3}'])
def test_a_broken_record_is_none_and_is_replaced(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHLOOM_CACHE", str(tmp_path))
    record_path().write_text(content)
    assert read_record(record_path()) == {}
    times = {"cudnn": 1.0, "flash": 2.0}
    remember(record_path(), "work", times)  # type: ignore[arg-type]
    assert read_record(record_path()) == {"work": times}
    remember(record_path(), "work", {"flash4": 0.5})
    assert read_record(record_path()) == {"work": {**times, "flash4": 0.5}}
    assert list(tmp_path.iterdir()) == [record_path()]


def test_of_a_record_only_times_that_can_be_are_read(tmp_path: Path) -> None:
    record = tmp_path / "attention.json"
    h200, h100 = '{"cudnn": 1, "flash": null, "flash4": "fast", "flash9": 2}', '{"cudnn": NaN, "flash": Infinity, "flash4": -1}'
    record.write_text(f'{{"H200": {h200}, "H100": {h100}}}')
    assert read_record(record) == {"H200": {"cudnn": 1.0}, "H100": {}}


def test_a_run_does_not_need_a_folder_to_remember_in(tmp_path: Path) -> None:
    (tmp_path / "0").write_text("a file where the folder would be")
    assert run_ranks(1, chosen, str(tmp_path), [{}, {}]) == [[("cudnn", 2), ("cudnn", 2)]]


def test_times_are_of_a_gpu_and_of_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert attention_choice.machine().startswith(f"NVIDIA H200, torch {torch.__version__}, cuDNN ")


def test_a_window_has_a_kernel_of_its_own_where_it_hides_something() -> None:
    model = DecoderConfig(
        **{"dim": 64, "layers": 6, "heads": 4, "kv_heads": 2, "ffn_dim": 64, "vocabulary": 16},  # type: ignore[arg-type]
        layer_types=["sliding", "sliding", "full"],
        sliding_window=256,
    )
    assert windows_of(model) == [256, None]
    shapes = [shape_of(model, ParallelConfig(), length, 256) for length in (512, 256)]
    assert shapes == [Shape(512, 4, 2, 16, window=256), Shape(256, 4, 2, 16)]
    assert repr(shapes[1]) == "Shape(seq_len=256, heads=4, kv_heads=2, head_dim=16)", "remembered times are found by it"
    assert "window=256" in repr(shapes[0])
    device = torch.device("cpu")
    assert "window" in str(unsupported_reason("cudnn", shapes[0], device))
    assert "soft-cap" in str(unsupported_reason("flash", replace(shapes[1], softcap=50.0), device))


@pytest.mark.parametrize(
    ("softcap", "layout", "kernel", "refused"),
    [
        (50.0, {"cp": 2}, "cudnn", ["parallel.cp_kind"]),
        (50.0, {"cp": 2}, "flash4", []),
        (50.0, {"cp": 2, "cp_kind": "ulysses"}, "cudnn", []),
        (None, {"cp": 2}, "cudnn", []),
        (50.0, {}, "cudnn", []),
        (50.0, {"hdp": "greedy"}, "cudnn", ["parallel.hdp"]),
        (50.0, {"hdp": "greedy"}, "flash4", []),
    ],
)
def test_a_ring_with_a_soft_cap_needs_flash_attention_4(
    softcap: float | None, layout: dict[str, Any], kernel: Kernel, refused: list[str]
) -> None:
    model = DecoderConfig(dim=64, layers=1, heads=4, kv_heads=2, ffn_dim=64, vocabulary=16, attention_softcap=softcap)
    found = ring_kernel_problems(model, ParallelConfig(**layout), {None: kernel})
    assert [problem.key for problem in found] == refused
