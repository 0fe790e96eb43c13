"""File names that a manifest or an index gives: joined to its folder, they must stay inside."""

from __future__ import annotations

from pathlib import Path, PurePosixPath


def name_fault(name: object, *, nested: bool = False) -> str | None:
    """Return why a name that a file gives must not be joined to that file's folder; None for one that stays inside.

    nested: whether it may be in a folder below
    """
    if not isinstance(name, str) or not name or any(character in name for character in "\\\0"):
        return f"it names {name!r}, which is no name of a file"
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        return f"it names the file {name!r}, which is outside its folder; don't trust this folder"
    if not nested and len(path.parts) > 1:
        return f"it names the file {name!r}, which is not directly inside its folder"
    return None


def leads_outside(folder: Path, name: str) -> bool:
    """Return whether a name is that of a symbolic link which leads out of the folder."""
    path = folder / name
    return path.is_symlink() and not path.resolve().is_relative_to(folder.resolve())
