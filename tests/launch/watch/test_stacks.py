"""Stacks of other processes, as Python's faulthandler and py-spy write them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from meshloom.checkpoint import control
from meshloom.checkpoint.writing import writer
from meshloom.launch.watch import stacks
from meshloom.launch.watch.stacks import parse_own, parse_py_spy, take_stack
from meshloom.trainer.watch.process import process_state

WATCHED = """
import faulthandler, sys, threading, time
from meshloom.trainer.watch.rank import STACK_SIGNAL
faulthandler.register(STACK_SIGNAL, open(sys.argv[1], "w"), all_threads=True, chain=False)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
def stuck_here():
    time.sleep(60)
stuck_here()
"""
PY_SPY = """Process 7: python -m meshloom.launch.rank
Python v3.11.7 (/usr/bin/python3.11)

Thread 11 (idle): "watch"
    wait (/usr/lib/python3.11/threading.py:331)
Thread 7 (active): "MainThread"
    all_reduce (/venv/torch/distributed/distributed_c10d.py:3001)
    wrapper (/venv/torch/distributed/c10d_logger.py:83)
    Mesh.sum (/src/meshloom/parallel/mesh.py:171)
    Loop._sum_over_ranks (/src/meshloom/trainer/loop.py:215)
    Loop.step (/src/meshloom/trainer/loop.py:160)
"""


def test_a_running_process_writes_its_own(tmp_path: Path) -> None:
    file = tmp_path / "stack"
    process = subprocess.Popen([sys.executable, "-c", WATCHED, str(file)])
    try:
        deadline = time.monotonic() + 60
        found = None
        while time.monotonic() < deadline and (found is None or "stuck_here" not in found.told):
            time.sleep(0.1)
            found = take_stack(process.pid, file, stopped=False) if file.exists() else None
        assert found is not None and found.told.startswith("<string>:7 stuck_here") and not found.collective
        assert process_state(process.pid) in "SR"
    finally:
        process.kill()
        process.wait()
    assert process_state(process.pid) == "X"
    assert take_stack(process.pid, file, stopped=False) is None


def test_a_process_without_the_handler_gets_no_signal(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    assert take_stack(process.pid, tmp_path / "none", stopped=False) is None and process.poll() is None
    process.kill()
    process.wait()


def test_the_main_thread_of_py_spy() -> None:
    found = parse_py_spy(PY_SPY)
    assert found is not None and found.collective and not found.compiles
    assert found.told == (
        "distributed_c10d.py:3001 all_reduce < mesh.py:171 Mesh.sum < loop.py:215 Loop._sum_over_ranks < loop.py:160 Loop.step"
        " (py-spy)"
    )
    assert parse_py_spy("") is None and parse_own("") is None


@pytest.mark.parametrize(
    ("line", "waits"),
    [("    work.wait()", True), ("    x = loss.item()", True), ("    time.sleep(1)", False), ("    run()", False)],
)
def test_a_line_that_waits_is_a_collective(line: str, waits: bool, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(f"def f():\n{line}\n")
    text = f'Current thread 0x1 (most recent call first):\n  File "{tmp_path}/code.py", line 2 in f\n'
    found = parse_own(text)
    assert found is not None and found.collective is waits


SOURCE = Path(stacks.__file__).parents[2]
WAITS_IN_A_SAVE = f'''Thread 0x2 (most recent call first):
  File "/usr/lib/threading.py", line 331 in wait
  File "{SOURCE}/checkpoint/control.py", line 270 in _await_key
Current thread 0x1 (most recent call first):
  File "/usr/lib/threading.py", line 1060 in join
  File "{SOURCE}/checkpoint/saving/save.py", line 200 in join
  File "{SOURCE}/trainer/hooks/saving.py", line 150 in wait
'''


def test_a_rank_that_waits_in_a_save_is_told_from_one_that_writes() -> None:
    for text, waits in ((WAITS_IN_A_SAVE, True), (WAITS_IN_A_SAVE.replace("_await_key", "write"), False)):
        found = parse_own(text)
        assert found is not None and found.collective is waits
    writes = f'Thread 0x3 (most recent call first):\n  File "{SOURCE}/checkpoint/writing/writer.py", line 145 in _answer\n'
    behind_another = parse_own(writes + WAITS_IN_A_SAVE)  # an earlier save waits
    assert behind_another is not None and not behind_another.collective
    trains = parse_own(WAITS_IN_A_SAVE.replace(f"{SOURCE}/checkpoint/saving/save.py", "/src/step.py"))
    assert trains is not None and not trains.collective


def test_the_functions_in_which_a_save_waits_are_there() -> None:
    for module, (file, name) in ((control, stacks._AGREEMENT), (writer, stacks._WRITING)):
        assert Path(str(module.__file__)).name == file and callable(getattr(module, name))


def test_our_own_folder_named_torch_is_shown() -> None:
    frames = ["/v/torch/nn/functional.py", f"{SOURCE}/parallel/torch/step.py", f"{SOURCE}/trainer/loop.py"]
    found = parse_own(
        "Current thread 0x1 (most recent call first):\n" + "".join(f'  File "{f}", line 1 in f\n' for f in frames)
    )
    assert found is not None and found.told == "functional.py:1 f < step.py:1 f < loop.py:1 f"


@pytest.mark.parametrize("packages", ["/v", f"{SOURCE}/.venv/lib/python3.12/site-packages"])
def test_an_operator_of_torch_that_waits_is_a_collective(packages: str) -> None:
    """Tensor parallelism waits for its sums so."""
    frames = ["torch/_ops.py", "torch/distributed/_functional_collectives.py"]
    files = [*(f"{packages}/{frame}" for frame in frames), f"{SOURCE}/parallel/torch/step.py"]
    lines = [f'  File "{file}", line 1 in f\n' for file in files]
    for order, waits in ((lines, True), ([lines[0], lines[2], lines[1]], False)):
        found = parse_own(f"Current thread 0x1 (most recent call first):\n{''.join(order)}")
        assert found is not None and found.collective is waits


RUNS_A_COMPILED_GRAPH = """Current thread 0x1 (most recent call first):
  File "/v/triton/backends/nvidia/driver.py", line 713 in __call__
  File "/v/triton/runtime/jit.py", line 756 in run
  File "/v/torch/_inductor/runtime/triton_heuristics.py", line 1500 in run
  File "/tmp/torchinductor_me/rb/crb3.py", line 110 in call
  File "/v/torch/_inductor/utils.py", line 3200 in run
  File "/v/torch/_inductor/output_code.py", line 763 in __call__
  File "/v/torch/_functorch/_aot_autograd/runtime_wrappers.py", line 2548 in __call__
  File "/v/torch/_functorch/aot_autograd.py", line 1277 in forward
  File "/v/torch/_dynamo/eval_frame.py", line 1446 in _fn
  File "/v/meshloom/models/decoder.py", line 9 in forward
"""


@pytest.mark.parametrize(
    ("inner", "compiles"), [("", False), ("torch/_dynamo/convert_frame.py", True), ("triton/compiler/compiler.py", True)]
)
def test_a_graph_that_is_compiled_compiles_no_more(inner: str, compiles: bool) -> None:
    """It may wait for other ranks, or for the device. Its kernels may be compiled at their first call."""
    head, _, rest = RUNS_A_COMPILED_GRAPH.partition("\n")
    found = parse_own("\n".join([head, *([f'  File "/v/{inner}", line 1 in f'] if inner else []), rest]))
    assert found is not None and found.compiles is compiles


def test_a_compiler_at_work_is_seen() -> None:
    text = 'Current thread 0x1 (most recent call first):\n  File "/v/torch/_inductor/codecache.py", line 9 in load\n'
    found = parse_own(text)
    assert found is not None and found.compiles


@pytest.mark.parametrize("file", ["torch/_inductor/compile_fx.py", "triton/compiler/compiler.py", "cutlass/base_dsl/dsl.py"])
def test_a_compiler_in_another_thread_is_seen(file: str) -> None:
    main = 'Current thread 0x1 (most recent call first):\n  File "/v/meshloom/step.py", line 9 in run\n'
    other = f'Thread 0x2 (most recent call first):\n  File "/v/{file}", line 9 in compile\n'
    idle = [
        other.replace(file, each) for each in ("torch/_inductor/compile_worker/subproc_pool.py", "torch/_dynamo/eval_frame.py")
    ]
    assert [found.compiles for text in (other, *idle) if (found := parse_own(text + main)) is not None] == [True, False, False]
