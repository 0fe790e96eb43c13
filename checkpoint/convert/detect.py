"""Bring in checkpoints that other programs wrote. Which program it was is told by the files."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError


def bring_in(
    source: Path, folder: str | Path, kind: str | None = None, tokenizer: Path | None = None, *, overwrite: bool = False
) -> Path:
    """Make a checkpoint out of a folder of kind hf, deepspeed or dcp (None: find out). Returns the step's folder.

    tokenizer: the model's tokenizer.json, or a folder with one; None: that of the folder, if it has one

    Raises CheckpointError if the folder is not what such a program writes, or damaged; OSError if the disk says no.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source} is not a folder")
    kind = kind or kind_of(source)
    try:
        return _bring_in(source, folder, kind, tokenizer, overwrite)
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # whatever their readers, or ours, make of a file that is cut off or lacks a part
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(f"{source}: as a folder of kind {kind} it is damaged or incomplete ({what})") from error


def _bring_in(source: Path, folder: str | Path, kind: str, tokenizer: Path | None, overwrite: bool) -> Path:
    if kind == "hf":
        from .hugging_face.importing import import_hf

        return import_hf(source, folder, tokenizer, overwrite=overwrite)
    if kind == "deepspeed":
        from .deepspeed import import_deepspeed

        return import_deepspeed(source, folder, tokenizer, overwrite=overwrite)
    from .dcp import import_dcp

    return import_dcp(source, folder, tokenizer, overwrite=overwrite)


def kind_of(source: Path) -> str:
    """hf, deepspeed or dcp. Raises CheckpointError if it is none of them."""
    if (source / "config.json").is_file():
        return "hf"
    if (source / ".metadata").is_file():
        return "dcp"
    marks = ("latest", "latest_universal", "zero")
    if any((source / mark).exists() for mark in marks) or list(source.glob("*_optim_states.pt")):
        return "deepspeed"
    raise CheckpointError(f"{source}: no config.json (hf), .metadata (dcp), latest or *_optim_states.pt (deepspeed) in it")
