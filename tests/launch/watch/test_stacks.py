"""Stacks of other processes, as Python's faulthandler and py-spy write them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def test_who_waits_in_a_save_for_other_ranks_is_told_from_who_writes() -> None:
    for text, waits in ((WAITS_IN_A_SAVE, True), (WAITS_IN_A_SAVE.replace("_await_key", "write"), False)):
        found = parse_own(text)
        assert found is not None and found.collective is waits
    trains = parse_own(WAITS_IN_A_SAVE.replace(f"{SOURCE}/checkpoint/saving/save.py", "/src/step.py"))
    assert trains is not None and not trains.collective


def test_an_operator_of_torch_that_waits_is_a_collective() -> None:
    """Tensor parallelism waits for its sums so."""
    frames = ["torch/_ops.py", "torch/distributed/_functional_collectives.py", "meshloom/models/block.py"]
    lines = [f'  File "/v/{file}", line 1 in f\n' for file in frames]
    for order, waits in ((lines, True), ([lines[0], lines[2], lines[1]], False)):
        found = parse_own(f"Current thread 0x1 (most recent call first):\n{''.join(order)}")
        assert found is not None and found.collective is waits


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
