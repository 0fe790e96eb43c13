"""Settings of every test: one thread, no CUDA in the parent that ranks are forked from, and examples that do not change."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from meshloom.checkpoint import faults
from meshloom.checkpoint.memory.keeper import dismiss, registered
from meshloom.trainer.schema import make_composer
from support.composing import share_compositions
from support.tiny_run import TINY

torch.set_num_threads(1)

# An example may take as long as a busy machine needs, and a run of the tests draws the same ones as the last.
settings.register_profile("everywhere", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("everywhere")

share_compositions()

MOST_WORKERS = 8  # each imports torch, and forks up to eight ranks


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process of tests for each core, or one alone where there is a GPU: tests on it must be the last of their process."""
    return 0 if torch.cuda.is_available() else min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # files are dealt to processes in this order: no long one is left for the end
        tests = Counter(item.path for item in items)
        slow = Counter(item.path for item in items if "slow" in item.keywords)
        items.sort(key=lambda item: (-slow[item.path], -tests[item.path]))
    if torch.cuda.is_available():
        items.sort(key=lambda item: "gpu" in item.keywords)  # last: from a process that has used one no ranks are forked
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Compose a config once for all forked ranks, and let their garbage collector pass over what was there before.

    Either takes a third of a small run: the first composition registers schemas, looks for plugins and fills a parser's caches.
    """
    make_composer().compose([*TINY, "resume=auto", "trainer.hooks=[{_target_:some.Hook,step:1}]"])
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    """Every test closes the process groups that it opens: ranks forked by later tests would find them."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail("this test leaves the default process group open; close the run or the mesh that it opened")


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """No fault stays installed, and no keeper of a run in the test's folder stays alive."""
    yield
    faults.install(None)
    for entry, address in registered(tmp_path).items():
        dismiss(entry, address)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Garbage is not collected: the trainer does that rarely, and what a save or a restore leaves behind is large."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
