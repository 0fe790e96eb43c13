"""Names that a checkpoint's own text gives stay inside its folder, whatever they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshloom.checkpoint.errors import CheckpointError
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import list_steps, load_manifest, open_step, read_owner
from meshloom.checkpoint.identity import RunIdentity
from meshloom.checkpoint.manifest import Manifest
from meshloom.config.names import name_fault
from meshloom.data.shards.manifest import FileEntry, ShardError
from support.checkpoint_runs import restored_step, save_steps
from support.old_formats import rewrite_as


@pytest.fixture
def step(tmp_path: Path) -> Path:
    save_steps(tmp_path / "run", 1)
    return tmp_path / "run/step-00000001"


def rewrite(step: Path, **changes: Any) -> None:
    manifest = load_manifest(open_files(step))
    (step / "manifest.json").write_bytes(replace(manifest, **changes).encode())


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/../../x", "a/b", "..", "", ".", "a\\b", "a\0b", None])
def test_a_name_that_leads_out_is_a_fault(name: object) -> None:
    assert name_fault(name) is not None


def test_names_inside_are_none() -> None:
    assert [name_fault("rank-00000.safetensors"), name_fault("..a"), name_fault("a/b", nested=True)] == [None] * 3
    assert name_fault("a/../b", nested=True) is not None


@pytest.mark.parametrize("suffix", ["/../../outside", "/x", "\0"])
def test_a_file_outside_is_not_read(step: Path, suffix: str) -> None:
    rewrite(step, suffix=suffix)
    with pytest.raises(CheckpointError, match=r"manifest.json: it names .*'rank-00000"):
        open_step(open_files(step))


@pytest.mark.parametrize("field", ["name", "leaves"])
def test_a_file_outside_is_not_read_in_format_3(step: Path, field: str) -> None:
    rewrite_as(step, 3, **{field: "../outside"})
    with pytest.raises(CheckpointError, match=r"manifest.json: it names the file '\.\./outside'"):
        open_step(open_files(step))


def test_a_link_out_of_a_steps_folder_is_not_read(step: Path) -> None:
    name = load_manifest(open_files(step)).files[0].name
    (step / name).rename(step / "inside")
    (step / name).symlink_to("inside")
    assert restored_step(step.parent) == 1
    (step / "inside").rename(step.parent / "outside")
    (step / name).unlink()
    (step / name).symlink_to("../outside")
    with pytest.raises(CheckpointError, match="outside of the folder"):
        restored_step(step.parent)


def test_an_id_that_is_a_path_moves_nothing(step: Path) -> None:
    rewrite(step, run=RunIdentity("../../../x"))
    folder = open_files(step.parent)
    assert list_steps(folder).heads == {step.name: None}
    (step.parent / "run.json").write_text(json.dumps({"id": "../../x", "parent": None}))
    assert read_owner(folder) is None
    with pytest.raises(CheckpointError, match="no id of a run"):
        Manifest.decode((step / "manifest.json").read_bytes(), "here")


def test_token_shards_name_files_of_their_folder() -> None:
    with pytest.raises(ShardError, match="outside its folder"):
        FileEntry("../tokens.bin", 3, "")
