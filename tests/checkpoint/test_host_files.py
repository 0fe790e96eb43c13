"""Files of hosts (`checkpoint.files=host`): the same bytes in fewer files, and each rank's part found, checked and named."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
import xxhash

from meshloom.checkpoint import faults
from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import CheckpointError, DamageError
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import find_latest, load_manifest
from meshloom.checkpoint.rebuild import lost_files
from meshloom.checkpoint.report import SaveReport, culprit_of
from meshloom.checkpoint.restore import restore
from meshloom.checkpoint.saving.file_report import FileReport, segments_of
from meshloom.checkpoint.tools import summary, verify
from meshloom.checkpoint.writing.writer import Request, Writer
from meshloom.config.problems import ConfigError
from meshloom.parallel import hosts
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from support.checkpoint_layouts import load_second_reader
from support.checkpoint_worlds import fragments, holds, make_arrays, together
from support.crash_memory import end_keepers

ARRAYS = make_arrays(large=True)
WORLD, PER_HOST = 5, 2
_here = threading.local()


@pytest.fixture(autouse=True)
def several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads here, and every two of them believe that they are alone on a host."""
    monkeypatch.setattr(hosts, "host_name", lambda: f"host {_here.rank // PER_HOST}")


def save(folder: Path, files: str, *, disk: bool = True, **config: object) -> list[SaveReport]:
    """Save step 6 with these files; return what each rank was told. files: of all ranks, or of each, separated by commas"""
    ranks, of_rank = fragments(ARRAYS, WORLD, 11), (files.split(",") * WORLD)[:WORLD]

    def body(control: Control) -> SaveReport:
        _here.rank = control.rank
        settings = CheckpointConfig(**{"mode": "sync", "timeout": 60.0, "files": of_rank[control.rank], **config})  # type: ignore[arg-type]
        checkpointer = Checkpointer(folder, control, settings)
        checkpointer.save(6, ranks[control.rank], {"note": "héllo"}, required=True, disk=disk)
        checkpointer.before_update()
        reports = checkpointer.wait()
        checkpointer.close()
        return reports[0]

    return together(WORLD, body)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same step with files of ranks, and with files of hosts."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("rank", "host")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "host_name", lambda: f"host {_here.rank // PER_HOST}")
        for kind, folder in folders.items():
            assert [report.outcome for report in save(folder, kind)] == ["committed"] * WORLD
    return {kind: folder / "step-00000006" for kind, folder in folders.items()}


def rows(step: Path) -> list[list[int]]:
    return json.loads((step / "manifest.json").read_text())["files"]


@pytest.fixture
def step(kinds: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the step with files of hosts, to be damaged."""
    copy = tmp_path / "step-00000006"
    copy.mkdir()
    for path in kinds["host"].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_one_file_of_each_host_instead_of_two_of_each_rank(kinds: dict[str, Path]) -> None:
    names = {kind: sorted(path.name for path in step.iterdir()) for kind, step in kinds.items()}
    assert names["host"] == [*(f"host-0000{first}.segments" for first in (0, 2, 4)), "manifest.json"]
    assert len(names["rank"]) == 2 * WORLD + 1


def test_a_segment_is_the_ranks_file_then_its_digests_then_zeros(kinds: dict[str, Path]) -> None:
    ends: dict[str, int] = {}
    for rank, size, _, _, host, start in rows(kinds["host"]):
        assert host == rank // PER_HOST * PER_HOST
        own = [(kinds["rank"] / f"rank-{rank:05d}.{kind}").read_bytes() for kind in ("safetensors", "leaves")]
        end = -(-(start + len(own[0]) + len(own[1])) // 4096) * 4096
        file = kinds["host"] / f"host-{host:05d}.segments"
        assert size == len(own[0])
        assert start == ends.get(file.name, 0), "no page between two segments is left out, and none is in both"
        assert file.read_bytes()[start:end] == b"".join(own).ljust(end - start, b"\0")
        ends[file.name] = end
    assert ends == {path.name: path.stat().st_size for path in kinds["host"].glob("host-*")}


@pytest.mark.parametrize(("world", "seed"), [(1, 3), (3, 4), (8, 5)])
@pytest.mark.parametrize("kind", ["rank", "host"])
def test_either_is_restored_on_other_layouts(kinds: dict[str, Path], kind: str, world: int, seed: int) -> None:
    ranks = fragments(ARRAYS, world, seed, blank=True)
    together(world, lambda control: restore(kinds[kind], ranks[control.rank], control))
    assert holds(ranks, ARRAYS)


def test_tools_and_the_reader_in_the_docs_read_files_of_hosts(kinds: dict[str, Path]) -> None:
    found = [list(verify(open_files(step))) for step in kinds.values()]
    assert found[0] == found[1] and all(isinstance(each, int) for each in found[0])
    checkpoint = load_second_reader().Checkpoint(kinds["host"])
    for key, value in ARRAYS.items():
        shown = checkpoint[key]
        assert torch.equal(torch.from_numpy(shown), value.float() if value.dtype == torch.bfloat16 else value), key
    listed = summary(open_files(kinds["host"]))["files"]
    assert listed == {path.name: path.stat().st_size for path in sorted(kinds["host"].glob("host-*"))}
    assert find_latest(kinds["host"].parent) == kinds["host"]


def test_a_part_of_an_array_is_read_without_the_rest(kinds: dict[str, Path]) -> None:
    value = ARRAYS["weight/head.weight"]
    box = Box((1000, 0), (64, value.shape[1]))
    read: list[int] = []
    for step in kinds.values():
        part = torch.full(box.shape, 77.0)
        held = [Fragment("head.weight", "weight", tuple(value.shape), box, part)]
        read.append(restore(step, held, Control.alone(), strict=False).bytes_read)
        assert torch.equal(part, value[box.slices()])
    assert read[0] == read[1] < value.nbytes // 4


def test_damage_names_the_file_and_the_rank_whose_part_it_is(step: Path) -> None:
    for rank, size, _, _, host, start in rows(step):
        file = step / f"host-{host:05d}.segments"
        whole = file.read_bytes()
        for at, part in ((start, "segment"), (start + size - 1, "segment"), (start + size, "digests")):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            (blank,) = fragments(ARRAYS, 1, 3, blank=True)
            named = f"{file}, {part} of rank {rank}"
            with pytest.raises(DamageError) as caught:
                restore(step, blank, Control.alone())
            assert caught.value.file == named
            assert all(bool((fragment.tensor == 77).all()) for fragment in blank)
            found = [fault for fault in verify(open_files(step)) if isinstance(fault, DamageError)]
            assert named in [fault.file for fault in found]
            assert all(fault.file.endswith(f"rank {rank}") for fault in found)
        file.write_bytes(whole)


def test_bytes_behind_a_segment_are_verified_too(step: Path) -> None:
    rank, size, _, _, host, start = rows(step)[0]
    file = step / f"host-{host:05d}.segments"
    data = bytearray(file.read_bytes())
    at = start + size + sum(-(-size // each) * 16 for each in (4096, 2**24))  # behind the digests of leaves and of blocks
    assert data[at] == 0 and at % 4096
    data[at] = 1
    file.write_bytes(data)
    (fault,) = [fault for fault in verify(open_files(step)) if isinstance(fault, DamageError)]
    assert fault.file == f"{file}, segment of rank {rank}"
    (blank,) = fragments(ARRAYS, 1, 3, blank=True)
    restore(step, blank, Control.alone())  # which needs none of it
    assert holds([blank], ARRAYS)


@pytest.mark.parametrize("change", [-1, -4096, 4096, None])
def test_a_hosts_file_of_another_length_is_refused_once(step: Path, change: int | None) -> None:
    file = step / "host-00002.segments"
    if change is None:
        file.unlink()
    else:
        file.write_bytes((file.read_bytes() + b"\0" * 4096)[: file.stat().st_size + change])
    (blank,) = fragments(ARRAYS, 1, 3, blank=True)
    with pytest.raises(DamageError, match=r"host-00002\.segments: the file (has|is)"):
        restore(step, blank, Control.alone())
    assert find_latest(step.parent) is None
    assert [fault.file for fault in verify(open_files(step)) if isinstance(fault, DamageError)] == [str(file)]


@pytest.mark.parametrize(
    ("change", "lost", "damaged"), [(-1, [], 0), (1, [], 0), (4096, [], 0), (-4096, [], 1), (None, [2, 3], 0)]
)
def test_only_ranks_whose_segments_are_not_whole_are_lost(
    step: Path, change: int | None, lost: list[int], damaged: int
) -> None:
    file, manifest = step / "host-00002.segments", load_manifest(open_files(step))
    if change is None:
        file.unlink()
    else:
        file.write_bytes((file.read_bytes() + b"\0" * 4096)[: file.stat().st_size + change])
    missing, broken = lost_files(open_files(step), manifest, 0, 1)
    assert ([manifest.files[number].rank for number in missing], len(broken)) == (lost, damaged)
    assert [fault.file for fault in verify(open_files(step)) if isinstance(fault, DamageError)] == [str(file)]
    assert find_latest(step.parent) is None


def test_a_manifest_whose_segments_do_not_follow_each_other_is_refused(step: Path) -> None:
    path = step / "manifest.json"
    manifest = load_manifest(open_files(step))
    manifest.files[1].start += 4096
    text = manifest.encode()
    body = text[: text.rfind(b'"digest": "')]
    path.write_bytes(body + f'"digest": "{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'.encode())
    (blank,) = fragments(ARRAYS, 1, 3, blank=True)
    with pytest.raises(DamageError, match="segment of rank 1, does not begin where"):
        restore(step, blank, Control.alone())
    with pytest.raises(ValueError, match=r"host-00000\.segments: its segment at byte \d+ does not begin where"):
        load_second_reader().Checkpoint(step)


def test_a_rank_that_wrote_elsewhere_than_planned_fails_the_save() -> None:
    reports = [FileReport(rank, 5000, 4096, "00" * 16, start, rank != 1) for rank, start in ((0, 0), (1, 8192), (2, 0))]
    first = {0: 0, 1: 0, 2: 2}
    assert [(file.name, file.start) for file in segments_of(reports, first)] == [
        ("host-00000.segments", 0), ("host-00000.segments", 8192), ("host-00002.segments", 0),
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"rank 2: wrote at byte 0 of host-00000\.segments, not at byte 16384") as caught:
        segments_of(reports, {0: 0, 1: 0, 2: 0})
    assert {culprit_of(str(caught.value), rank) for rank in range(3)} == {2}


def test_a_hosts_file_whose_name_goes_while_it_is_written_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, begin = threading.Event(), Writer.begin

    def begin_late(writer: Writer, request: Request) -> None:
        if request.start:  # the second rank of its host
            assert gone.wait(20)
        begin(writer, request)

    def delete(boundary: str, amount: int) -> int:
        if boundary == "report.before" and not gone.is_set():  # the first rank of a host has written
            (found,) = tmp_path.glob("step-*.tmp-*/host-00000.segments")
            for path in found.parent.iterdir():
                path.unlink()
            gone.set()
        return amount

    monkeypatch.setattr(Writer, "begin", begin_late)
    monkeypatch.setattr(hosts, "host_name", lambda: "one host")
    faults.install(delete)
    try:
        reports = save(tmp_path, "host")
    finally:
        faults.install(None)
    assert {report.outcome for report in reports} == {"failed"}
    assert all("host-00000.segments was gone, which rank 0 had created" in report.reason for report in reports)
    assert not list(tmp_path.glob("step-*"))


def test_ranks_with_different_settings_fail_the_save(tmp_path: Path) -> None:
    reports = save(tmp_path, "host,host,rank,host,host")
    assert {report.outcome for report in reports} == {"failed"}
    assert all("rank 2: checkpoint.files is not host, as on rank 0" in report.reason for report in reports)
    assert {report.culprit for report in reports} == {2}
    assert not list(tmp_path.glob("step-*"))


def test_snapshots_in_memory_stay_files_of_ranks(tmp_path: Path) -> None:
    (blank,) = fragments(ARRAYS, 1, 3, blank=True)
    try:
        assert [report.outcome for report in save(tmp_path, "host", memory_every=1, disk=False)] == ["kept"] * WORLD
        assert restore(tmp_path, blank, Control.alone()).source.startswith("memory of step 6")
        assert holds([blank], ARRAYS)
    finally:
        end_keepers(tmp_path)
    assert [report.outcome for report in save(tmp_path, "host", memory_every=1)] == ["committed"] * WORLD
    assert len(list((tmp_path / "step-00000006").glob("host-*"))) == 3


def test_object_stores_are_refused_by_key() -> None:
    (problem,) = CheckpointConfig(files="host", folder="s3://bucket/run").problems()
    assert (problem.key, problem.fix) == ("checkpoint.files", "use rank")
    assert [problem.key for problem in CheckpointConfig(files="node").problems()] == ["checkpoint.files"]
    with pytest.raises(ConfigError, match=r"checkpoint\.files"):  # where the folder follows from output_dir
        Checkpointer("memory://run/checkpoints", Control.alone(), CheckpointConfig(files="host"))
