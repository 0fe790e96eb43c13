"""Read boxes of our weights out of a Hugging Face folder's files: only the bytes that hold them, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed import ProcessGroup

from ....parallel.box import Box
from ...dtypes import TORCH_DTYPES, as_tensor, same_bits
from ...errors import CheckpointError
from ...manifest import StoredArray
from ...reading.compare import parts as cut
from ...reading.items import Raw
from ...reading.raw import RAW
from ...reading.reader import ReadBytes, Reader
from ...reading.shared_reader import SharedReader
from .encodings import PlainTensor, Tensor
from .folder import HEAD, HuggingFaceFolder
from .layout import PlacedPart


@dataclass
class _Job:
    """A box of a weight inside one of its parts. sources: what is read for it; target: what it fills"""

    placed: PlacedPart
    tensor: Tensor
    region: Box
    sources: Sequence[tuple[StoredArray, Box]]
    target: torch.Tensor
    origin: tuple[int, ...]

    @property
    def is_direct(self) -> bool:
        """True if each piece that is read is a piece of the box."""
        return self.placed.part.is_plain and isinstance(self.tensor, PlainTensor)

    @property
    def position(self) -> tuple[int, int]:
        """The file that it is read from, and where in it."""
        stored = self.sources[0][0].boxes[0]
        return stored.file, stored.start

    def write(self, box: Box, values: torch.Tensor) -> None:
        """Put values into the target. box: of the weight"""
        self.target[box.slices(self.origin)].copy_(values.reshape(box.shape))


def fill(
    folder: HuggingFaceFolder, wanted: Iterable[tuple[str, Box, torch.Tensor]], group: ProcessGroup | None = None
) -> ReadBytes:
    """Fill tensors with boxes of our weights. Returns the bytes that this rank wanted, and those it read.

    wanted: our name, the box, and the tensor of its shape. Values are converted to the tensor's type.
    group: of ranks that call this together: a byte that several need is read by one of them and passed on

    Host memory holds a few spans of files, of 16 MiB each, or a window of one, and what of one file must be decoded. Raises
    DamageError for a file that has become shorter meanwhile, UnreadableError for one that can't be read now; some tensors are
    filled then. With a group a rank raises once all files have been gone through, since the others wait for it at each.
    """
    reader = Reader(folder.files, folder.stored) if group is None else SharedReader(folder.files, folder.stored, group)
    jobs = sorted((job for each in wanted for job in _jobs(folder, *each)), key=lambda job: job.position)
    held: list[Exception] = []
    for number in range(len(folder.stored.files)):
        mine = [job for job in jobs if job.position[0] == number]
        # With a group all ranks must read together, file by file; alone, what is decoded is read one by one.
        decoded = [job for job in mine if not job.is_direct]
        rounds = [mine] if group is not None else [[job for job in mine if job.is_direct], *([job] for job in decoded)]
        for some in rounds:
            try:
                _read_round(reader, some if not held else [])
            except Exception as error:
                if group is None:
                    raise
                held = held or [error]
    if held:
        raise held.pop()  # it has no name here: see `errors.py`
    return reader.traffic


def read_box(folder: HuggingFaceFolder, ours: str, box: Box) -> torch.Tensor:
    """Return a box of one of our weights, in its stored type."""
    dtype = TORCH_DTYPES[folder.manifest.arrays[f"weight/{ours}"].dtype]
    values = torch.empty(box.shape, dtype=dtype)
    fill(folder, [(ours, box, values)])
    return values


def check_head(folder: HuggingFaceFolder) -> None:
    """Raise CheckpointError for a head that is stored although it is tied, and is not the embedding."""
    if folder.head is None:
        return
    reader = Reader(folder.files, folder.stored)
    head, embedding = folder.head
    same = head.dtype == embedding.dtype
    for box in cut(StoredArray(HEAD, "tensor", head.dtype, head.shape)) if same else ():
        values = [_decoded(reader, each, box) for each in folder.head]
        same = same and torch.equal(*map(same_bits, values))
    if not same:
        raise CheckpointError(f"{folder.path}: tie_word_embeddings is true, but {HEAD} is not the embedding")


def _decoded(reader: Reader, tensor: Tensor, region: Box) -> torch.Tensor:
    sources = tensor.sources(region)
    read = [as_tensor(raw, array.dtype) for raw, (array, _) in zip(reader.read(sources), sources, strict=True)]
    return tensor.decode(read, region)


def _jobs(folder: HuggingFaceFolder, ours: str, box: Box, target: torch.Tensor) -> Iterator[_Job]:
    for placed in folder.placed[ours]:
        inside = placed.box.intersect(box)
        if inside is not None:
            tensor, region = folder.tensors[placed.part.name], placed.region(inside)
            view = target[inside.slices(box.offsets)]
            yield _Job(placed, tensor, region, tensor.sources(region), view, inside.offsets)


def _read_round(reader: Reader, jobs: Sequence[_Job]) -> None:
    owners: list[tuple[_Job, Raw | None]] = []
    kept: list[list[Raw]] = []
    for job in jobs:
        kept.append([] if job.is_direct else [np.empty(box.shape, RAW[array.item_bytes]) for array, box in job.sources])
        owners += [(job, None)] if job.is_direct else [(job, raw) for raw in kept[-1]]
    flat = [source for job in jobs for source in job.sources]
    with torch.no_grad():
        for number, region, values in reader.stream(flat):
            job, raw = owners[number]
            if raw is not None:
                raw[region.slices(flat[number][1].offsets)] = values
            else:
                job.write(job.placed.box_of(region), as_tensor(values, job.tensor.dtype))
        for job, raws in zip(jobs, kept, strict=True):
            if not job.is_direct:
                read = [as_tensor(raw, array.dtype) for raw, (array, _) in zip(raws, job.sources, strict=True)]
                job.target.copy_(job.placed.arrange(job.tensor.decode(read, job.region)))
                raws.clear()
