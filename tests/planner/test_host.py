"""The needs of a run and the limits of its host: snapshots, disks, containers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from meshloom.checkpoint.folder import load_manifest, open_files
from meshloom.checkpoint.saving.staging_size import rounded
from meshloom.launch.cli import main
from meshloom.launch.planning import make_plan
from meshloom.launch.shortages import shortages
from meshloom.planner.host import available_memory, free_disk, memory_limit
from meshloom.planner.offload import OffloadAccount
from support.configs import config_of
from support.ranks import run_ranks
from support.tiny_run import TINY, body

LLAMA = ["recipe=llama_1b", "batch.samples=8", "launch.nproc=2"]
STATE = 1_498_482_688 * 12  # fp32 masters and AdamW's moments
GIB = 2**30
Files = dict[str, str | int]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Files], Path]:
    """Make the root of a machine of 80 GiB, 64 of them free, with 4 GiB of swap.

    It has the control groups that /proc names, with these files under /sys/fs/cgroup.
    """
    memory = SimpleNamespace(available=64 * GIB, total=80 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=4 * GIB))

    def root_with(groups: str, files: Files) -> Path:
        root = tmp_path / "root"
        shutil.rmtree(root, ignore_errors=True)
        for name, text in {
            "proc/self/cgroup": groups,
            **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
        }.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{text}\n")
        return root

    return root_with


@pytest.fixture
def machine(place: Callable[[str, Files], Path]) -> Callable[[str, Files], int]:
    """Return the memory to be had of such a machine."""
    return lambda groups, files: available_memory(place(groups, files))


def test_without_a_limit_the_machines_memory_counts(machine: Callable[[str, Files], int], tmp_path: Path) -> None:
    assert available_memory(tmp_path / "nowhere") == 64 * GIB
    assert machine("0::/", {}) == 64 * GIB
    files: Files = {"a/memory.max": "max", "a/memory.current": 5, "a/memory.stat": "anon 5"}
    assert machine("0::/a", files) == 64 * GIB
    unlimited: Files = {"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/memory.usage_in_bytes": 5}
    assert machine("4:memory:/", unlimited | {"memory/memory.stat": "total_cache 5"}) == 64 * GIB


def test_cgroup_2_narrowest_group_counts_without_page_cache(machine: Callable[[str, Files], int]) -> None:
    stat = f"anon {GIB}\nfile {3 * GIB}\ninactive_file {GIB}\nactive_file {2 * GIB}"
    own: Files = {"job/memory.max": "max", "job/memory.current": 4 * GIB, "job/memory.stat": stat}
    above: Files = {"memory.max": 10 * GIB, "memory.current": 6 * GIB, "memory.stat": stat}
    assert machine("0::/job", own | above) == 7 * GIB
    assert machine("0::/job", own | above | {"job/memory.max": 8 * GIB}) == 7 * GIB
    assert machine("0::/job", own | above | {"job/memory.max": 5 * GIB}) == 4 * GIB
    assert machine("0::/../of/the/host", above) == 7 * GIB, "a container whose path is that of the host"


def test_version_1_of_a_container(machine: Callable[[str, Files], int]) -> None:
    files: Files = {
        "memory/memory.limit_in_bytes": 8 * GIB,
        "memory/memory.usage_in_bytes": 9 * GIB,
        "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}",
    }
    assert machine("5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/", files) == GIB
    assert machine("4:memory:/", files | {"memory/memory.usage_in_bytes": 20 * GIB}) == 0


def test_slabs_that_the_kernel_gives_back_count_as_free(machine: Callable[[str, Files], int]) -> None:
    """Dentries and inodes, of which reading many files leaves gigabytes (cgroup-v2.rst, slab_reclaimable)."""
    stat = f"anon {GIB}\nslab_reclaimable {10 * GIB}\nslab_unreclaimable {GIB}"
    assert machine("0::/", {"memory.max": 16 * GIB, "memory.current": 12 * GIB, "memory.stat": stat}) == 14 * GIB


def test_the_limit_is_that_of_the_machine_or_group_with_its_swap(place: Callable[[str, Files], Path]) -> None:
    assert memory_limit(place("0::/", {})) == 84 * GIB
    used: Files = {"memory.current": 15 * GIB, "memory.stat": "anon 5"}
    group = used | {"memory.max": 16 * GIB}
    for swap, expected in (("max", 20), (GIB, 17), (0, 16), (9 * GIB, 20)):
        assert memory_limit(place("0::/", group | {"memory.swap.max": swap})) == expected * GIB
    assert memory_limit(place("0::/", group)) == 20 * GIB, "a kernel that does not limit swap"
    assert memory_limit(place("0::/", used | {"memory.max": "max"})) == 84 * GIB
    first = {f"memory/memory.{name}": value for name, value in (("usage_in_bytes", 5), ("stat", "total_rss 5"))}
    first |= {"memory/memory.limit_in_bytes": 8 * GIB}
    assert memory_limit(place("4:memory:/", first)) == 12 * GIB
    assert memory_limit(place("4:memory:/", first | {"memory/memory.memsw.limit_in_bytes": 9 * GIB})) == 9 * GIB


def test_free_disk_space_is_that_of_the_nearest_parent_folder(tmp_path: Path) -> None:
    here = os.statvfs(tmp_path)
    for folder in (tmp_path / "not" / "yet", f"file://{tmp_path}"):
        assert free_disk(folder) == pytest.approx(here.f_bavail * here.f_frsize, rel=0.1)
    assert free_disk("s3://bucket/run") is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_planned_checkpoint_is_as_large_as_a_saved_one(tmp_path: Path, ranks: int) -> None:
    words = [*TINY, f"output_dir={tmp_path}", "trainer.steps=2", f"launch.nproc={ranks}", "parallel.zero=1", "optim=adamw"]
    assert run_ranks(ranks, body, words) == [0] * ranks
    manifest = load_manifest(open_files(tmp_path / "checkpoints" / "step-00000002"))
    saved = sum(array.bytes for array in manifest.arrays.values())
    needs = make_plan([*words, "model.vocabulary=61"]).needs
    assert needs.step == pytest.approx(saved, rel=1e-9 if ranks == 1 else 0.02)  # shares are of equal size
    assert needs.host == 2 * rounded(max(file.bytes for file in manifest.files))


def needs(*words: str) -> Any:
    return make_plan([*LLAMA, *words]).needs


def test_snapshots_of_a_process_are_its_share_of_the_state() -> None:
    half = STATE / 2
    assert (needs().step, needs().kept) == (pytest.approx(STATE, rel=1e-3), 3)
    assert needs().host == pytest.approx(2 * half, rel=1e-3)
    assert needs("checkpoint.keep=0").kept is None
    assert needs("parallel.zero=0").host == pytest.approx(2 * half, rel=1e-3), "copies share the work"
    assert needs("parallel.replicate=2").step == pytest.approx(STATE, rel=1e-3)
    assert needs("parallel.offload=cpu").host == pytest.approx(2 * half, rel=1e-3), "wherever the state is"
    mirrored = needs("checkpoint.memory_every=1")
    assert mirrored.host == pytest.approx((3 + 2) * half, rel=1e-3) and mirrored.least == pytest.approx(2 * half, rel=1e-3)
    assert needs("checkpoint.host_memory_gib=9").host == pytest.approx(half, rel=1e-3)
    assert needs("checkpoint.every=0").step == 0
    spilt = needs("checkpoint.snapshot_folder=/fast")
    assert spilt.host == 0 and spilt.spill == pytest.approx(half, rel=1e-3)


def warned(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The keys of which `plan` says that this machine has not enough for them."""
    assert main(["plan", *LLAMA, *words]) == 0
    printed = capsys.readouterr().out
    return [line.removeprefix("! ").partition(":")[0] for line in printed.splitlines() if line.startswith("! ")]


def test_plan_warns_by_key_where_the_host_is_too_small(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"output_dir={tmp_path}"
    has = {"memory": 2 * needs().host, "disk": 3 * needs().step, "/fast": needs().host}
    monkeypatch.setattr("meshloom.planner.host.available_memory", lambda: has["memory"])
    monkeypatch.setattr("meshloom.launch.shortages.free_disk", lambda folder: has.get(folder, has["disk"]))
    assert warned(capsys, folder) == []
    has["memory"] -= 1
    assert warned(capsys, folder) == ["checkpoint.host_memory_gib"]
    assert warned(capsys, folder, "launch.nodes=2", "parallel.replicate=2", "batch.micro=2") == [], "the nodes are elsewhere"
    assert warned(capsys, folder, "checkpoint.host_memory_gib=9") == []
    assert warned(capsys, folder, "checkpoint.host_memory_gib=8") == ["checkpoint.host_memory_gib"], "less than one snapshot"
    has["disk"] -= 1
    assert warned(capsys, folder, "checkpoint.every=0") == []
    assert warned(capsys, folder, "checkpoint.snapshot_folder=/fast") == ["checkpoint.folder"]
    (tmp_path / "checkpoints" / "step-00000007").mkdir(parents=True)
    assert warned(capsys, folder, "checkpoint.snapshot_folder=/fast") == [], "one of them is there already"
    has["/fast"] -= 1
    assert warned(capsys, folder, "checkpoint.snapshot_folder=/fast") == ["checkpoint.snapshot_folder"]


def test_room_for_what_is_offloaded_to_a_disk_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshloom.launch.shortages.free_disk", lambda folder: 19 if folder == "/fast" else 10**15)
    config = config_of(*LLAMA, "parallel.offload_path=/fast")
    for disk, keys in ((9, []), (10, ["parallel.offload_path"])):
        found = shortages(config, needs(), OffloadAccount(disk=disk), 2, 10**15)
        assert [problem.key for problem in found] == keys
