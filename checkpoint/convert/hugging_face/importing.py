"""Make a checkpoint out of a Hugging Face folder."""

from __future__ import annotations

import functools
from pathlib import Path

from ...dtypes import TORCH_DTYPES
from ...reading.compare import parts
from ..compose import Source, compose
from .folder import open_folder
from .reading import check_head, read_box


def import_hf(source: Path, folder: str | Path, tokenizer: Path | None = None, *, overwrite: bool = False) -> Path:
    """Make a checkpoint (step 0, weights only) out of a Hugging Face folder. Host memory holds a part of an array at a time.

    Its state carries the model's recipe as `config.model`. Weights keep their values and types. Raises CheckpointError for a
    folder that can't be taken: see `open_folder`.
    """
    opened = open_folder(source, tokenizer)
    check_head(opened)
    opened.warn_of_left_out()
    sources = [
        Source(
            array.name,
            "weight",
            TORCH_DTYPES[array.dtype],
            array.shape,
            functools.partial(read_box, opened, array.name, box),
            box=box,
        )
        for array in opened.manifest.arrays.values()
        for box in parts(array)
    ]
    return compose(folder, 0, sources, opened.manifest.state, opened.beside, overwrite=overwrite)
