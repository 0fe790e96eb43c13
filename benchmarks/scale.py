"""Measure what a checkpoint's control costs on thousands of ranks: this process plays some of them, with the real functions.

    python benchmarks/scale.py [model=8B,70B,671B] [ranks=64,512,4096,16384] [out=FILE.json]
    python benchmarks/scale.py table=FILE.json         # as docs/measurements/scale.md has it

Only the state of the other ranks is made up (`scale_state.py`): what they would say is put into the store, and the messages
that the played rank exchanges are counted there. Nothing is said of how fast a network or a file system is.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scale_state import MODELS, ROLES, Tensor, box_of, declarations, describe, layouts
from torch._C._distributed_c10d import HashStore

from meshloom.checkpoint.control import Control, children_of
from meshloom.checkpoint.digest import text_digest
from meshloom.checkpoint.files import LocalFiles
from meshloom.checkpoint.manifest import Manifest, encode_arrays, prove_manifest
from meshloom.checkpoint.planning.description import Description, join
from meshloom.checkpoint.planning.plan import FileLayout, SavePlan, lay_out
from meshloom.checkpoint.planning.planner import FREE, NO_STEP, Planner
from meshloom.checkpoint.reading.index import FileIndex, Locator
from meshloom.checkpoint.saving.file_report import FileReport, join_reports
from meshloom.parallel.fragment import Fragment
from meshloom.parallel.layout import Layout

HOST = 8
Row = dict[str, Any]


class CountingStore:
    """A store that counts what is asked of it."""

    def __init__(self, store: HashStore) -> None:
        self._store = store
        self.messages = 0

    def clone(self) -> CountingStore:
        """The same store."""
        return self

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.messages += 1
            return getattr(self._store, name)(*arguments)

        return call


def timed(row: Row, name: str, action: Callable[[], Any]) -> Any:
    """Call a function, and note the seconds that it has kept the processor: others may share it."""
    start = time.process_time()
    result = action()
    row[name] = round(time.process_time() - start, 4)
    return result


def peak_of(action: Callable[[], Any]) -> int:
    """Return the most bytes that a call has had at once."""
    tracemalloc.start()
    action()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def runs_of(rank: int, ranks: int) -> Iterator[tuple[int, range]]:
    """Yield each child of a rank in the tree, with the ranks that it sends for."""
    children = children_of(rank, ranks)
    for child, after in zip(children, [*children[1:], None], strict=True):
        stop = after if after is not None else min(ranks, child + max(1, child - rank))
        yield child, range(child, stop)


def first_plan(row: Row, tensors: list[Tensor], layout: Layout) -> tuple[SavePlan, bytes]:
    """The plan of a new state: what a rank says, what the coordinator joins and proves, and what each rank derives."""
    ranks, rank = layout.world_size, layout.world_size * 5 // 8
    held = tuple(declarations(tensors, layout, rank))
    mine = timed(row, "rank: describe, s", lambda: Description.of(held, rank).encode())
    row["rank: describe, bytes"] = len(mine)
    own = Description.of(tuple(declarations(tensors, layout, 0)), 0).encode()
    messages = [own, *(describe(tensors, layout, run).encode() for _, run in runs_of(0, ranks))]
    row["coordinator: received, bytes"] = sum(map(len, messages[1:]))
    whole = timed(row, "coordinator: join, s", lambda: join([Description.decode(each) for each in messages]).encode())
    if ranks <= 64:  # what was made up must be what the ranks would have said
        said = [Description.of(tuple(declarations(tensors, layout, each)), each) for each in range(ranks)]
        assert join(said).encode() == whole
    row["description, bytes"] = len(whole)

    def derive() -> FileLayout:
        return SavePlan.of(Description.decode(whole)).lay_out(rank, held)

    file = timed(row, "rank: derive its plan, s", derive)
    row["rank: derive its plan, peak bytes"] = peak_of(derive)
    row["header of its file, bytes"] = len(file.header)
    files_of_hosts(row, tensors, layout, whole)
    return SavePlan.of(Description.decode(whole)), whole


def files_of_hosts(row: Row, tensors: list[Tensor], layout: Layout, whole: bytes) -> None:
    """The same with checkpoint.files=host: the last rank of a host derives how long the others' parts are, too."""
    ranks = layout.world_size
    codes = [random.Random(rank // HOST).getrandbits(63) for rank in range(ranks)]
    described = replace(Description.decode(whole), hosts=np.array([range(ranks), codes], np.int64)).encode()
    row["files of hosts: description, bytes"] = len(described)
    last = ranks * 5 // 8 // HOST * HOST + HOST - 1
    held = tuple(declarations(tensors, layout, last))
    plan = timed(row, "files of hosts: derive, s", lambda: SavePlan.of(Description.decode(described)).lay_out(last, held))
    assert plan.segment is not None and plan.segment.host == last - HOST + 1


def later_plan(row: Row, tensors: list[Tensor], layout: Layout, whole: bytes) -> None:
    """A vote in which nothing has changed, of the coordinator, with the words of its children in the store."""
    ranks, layers = layout.world_size, 1 + max(tensor.layer for tensor in tensors)
    held: list[Fragment] = []
    for tensor in tensors:
        box = box_of(tensor, layers, layout, 0)
        if box is not None:
            values = torch.empty(box.shape, device="meta")
            held += [Fragment(tensor.name, role, tensor.shape, box, values) for role in ROLES]
    store = CountingStore(HashStore())
    control = Control(0, ranks, store)  # type: ignore[arg-type]
    planner = Planner()
    ballot: dict[str, Any] = {}
    children = [(child, describe(tensors, layout, run).encode()) for child, run in runs_of(0, ranks)]
    for time_number in (1, 2):
        talk = control.begin("save", 60)
        for child, message in children:
            note = {"plan": "" if time_number == 1 else text_digest(whole), "step": NO_STEP, "obstacles": {}, "left": 0}
            line = json.dumps({"digest": text_digest(message), "note": note}).encode()
            body = message if time_number == 1 else b""
            store.set(f"checkpoint/{talk.number}-save/up/{child}/0", b"m" + line + b"\n" + body)
        store.messages = 0
        ballot = timed(row, "coordinator: later vote, s", lambda talk=talk: planner.vote(talk, held, FREE))
        if time_number == 1:
            planner.adopt(planner.decide(ballot) or b"", 0)
    row["coordinator: later vote, messages"] = store.messages
    row["coordinator: children"] = len(children)
    timed(row, "coordinator: later decision, s", lambda: planner.decide(ballot))
    # Of the most burdened rank but the coordinator: two steps up and down, three words to each child and to those who answer.
    most = max(len(children_of(rank, ranks)) for rank in range(1, ranks))
    row["rank: messages of a save"] = 2 * (1 + 2 + 3 * most)


def commit(row: Row, plan: SavePlan, header: int, ranks: int) -> tuple[bytes, str]:
    """The coordinator's own work once all files are written, and the manifest."""
    each = FileLayout(bytes(header), (), header + plan.bytes // ranks)
    reports = [FileReport.of(rank, each, text_digest(b"%d" % rank)) for rank in range(ranks)]
    text = encode_arrays(plan.arrays, plan.tilings)

    def make() -> bytes:
        files = [report.file("") for report in FileReport.read_all(join_reports(reports))]
        return Manifest(1, ranks, {}, files, plan.arrays, tilings=plan.tilings).encode(text)

    head = timed(row, "coordinator: reports and manifest, s", make)
    row["manifest, bytes"] = len(head)
    return head, text


def resume(row: Row, tensors: list[Tensor], plan: SavePlan, head: bytes, old: Layout, new: Layout) -> None:
    """One rank of another layout opens the step; and what its host reads of headers."""
    manifest: Manifest = timed(row, "resume: decode, s", lambda: Manifest.decode(head, "here"))
    row["resume: peak bytes"] = peak_of(lambda: Manifest.decode(head, "here"))
    assert sum(file.bytes - file.header for file in manifest.files) <= plan.bytes
    manifest.files[-1].bytes += plan.bytes - sum(file.bytes - file.header for file in manifest.files)
    timed(row, "resume: prove, s", lambda: prove_manifest(manifest, "here"))
    layers, first = 1 + max(tensor.layer for tensor in tensors), new.world_size // 2
    wanted = [
        [
            (manifest.arrays[f"{role}/{tensor.name}"], box)
            for tensor in tensors
            if (box := box_of(tensor, layers, new, rank)) is not None
            for role in ROLES
        ]
        for rank in range(first, first + HOST)
    ]
    locator = Locator(manifest, "here")
    numbers = timed(row, "resume: files of a rank, s", lambda: locator.files_with(wanted[0]))
    row["resume: files of a rank"] = len(numbers)
    needed = sorted({number for each in wanted for number in locator.files_with(each)})
    row["resume: files of a host"] = len(needed)
    size = proofs = 0
    for number in needed[:4]:
        rank = manifest.files[number].rank
        held = tuple(declarations(tensors, old, rank))
        header = lay_out(held, plan.pieces(rank, held)).header
        size, proofs = size + len(header), proofs + 4 * 65536
        manifest.files[number].header = len(header)
        manifest.files[number].bytes = 2**40
        timed(row, "resume: parse an index, s", lambda n=number, h=header: FileIndex.parse(manifest, n, h, "here"))
    count = len(needed[:4]) or 1
    row["resume: metadata of a host, bytes"] = len(head) + len(needed) * size // count
    row["resume: digests beside it, bytes"] = len(needed) * proofs // count


def listing(row: Row, head: bytes, ranks: int) -> None:
    """Do what retention and `list` do with a step: a listing of its files, and the manifest without arrays."""
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(ranks):
            (Path(folder) / f"rank-{rank:05d}.safetensors").touch()
            (Path(folder) / f"rank-{rank:05d}.leaves").touch()
        timed(row, "list: lengths, s", LocalFiles(Path(folder)).sizes)
    timed(row, "list: manifest, s", lambda: Manifest.decode(head, "here", arrays=False))


def table(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of a table of what was measured."""
    columns: dict[str, Callable[[Row], str]] = {
        "Model, ranks": lambda row: f"{row['model']}, {row['ranks']:,}",
        "Layout": lambda row: row["layout"],
        "A rank's first plan, s": lambda row: f"{row['rank: describe, s'] + row['rank: derive its plan, s']:.2f}",
        "its memory, MB": lambda row: f"{row['rank: derive its plan, peak bytes'] / 1e6:.0f}",
        "Rank 0 joins, s": lambda row: f"{row['coordinator: join, s']:.2f}",
        "Description, kB": lambda row: f"{row['description, bytes'] / 1e3:.0f}",
        "Later vote of rank 0, ms": lambda row: f"{1e3 * row['coordinator: later vote, s']:.1f}",
        "Commit of rank 0, s": lambda row: f"{row['coordinator: reports and manifest, s'] + row['list: lengths, s']:.2f}",
        "Messages of a save": lambda row: str(row["rank: messages of a save"]),
        "Manifest, MB": lambda row: f"{row['manifest, bytes'] / 1e6:.2f}",
        "Opening it, s": lambda row: f"{row['resume: decode, s'] + row['resume: prove, s']:.2f}",
        "Metadata of a host, MB": lambda row: f"{row['resume: metadata of a host, bytes'] / 1e6:.1f}",
    }
    yield f"| {' | '.join(columns)} |"
    yield f"|---|---{'|---:' * (len(columns) - 2)}|"
    for row in rows:
        yield f"| {' | '.join(column(row) for column in columns.values())} |"


def main() -> None:
    """Entry point."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    if "table" in given:
        print("\n".join(table(json.loads(Path(given["table"]).read_text()))))
        return
    rows: list[Row] = []
    for model in given.get("model", "8B,70B,671B").split(","):
        tensors = MODELS[model]()
        for ranks in map(int, given.get("ranks", "64,512,4096,16384").split(",")):
            every = layouts(model, ranks)
            for name, layout in every.items():
                row: Row = {"model": model, "layout": name, "ranks": ranks}
                plan, whole = first_plan(row, tensors, layout)
                later_plan(row, tensors, layout, whole)
                head, _ = commit(row, plan, row["header of its file, bytes"], ranks)
                others = [other for other in every.values() if other != layout] or list(layouts(model, ranks // 2).values())
                resume(row, tensors, plan, head, layout, others[0])
                listing(row, head, ranks)
                rows.append(row)
                print(json.dumps(row), flush=True)
    if "out" in given:
        Path(given["out"]).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
