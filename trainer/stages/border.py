"""The border of two stages: the run of the next stage resumes, in the same processes, from the last one's checkpoint."""

from __future__ import annotations

import dataclasses
import gc

import torch

from ...config.problems import ConfigError, Problem
from ...data.node import DataNode
from ...parallel.mesh import Mesh
from ..derived import checkpoint_folder
from ..find_checkpoint import checkpoint_manifest, saved_progress
from ..resolve import ResolvedRun
from .record import StageRecord
from .written import Stage


def read_record(run: ResolvedRun) -> StageRecord:
    """Return the record with which a run's stage begins from the newest checkpoint in the run's folder."""
    assert run.place is not None
    state = checkpoint_manifest(checkpoint_folder(run.config)).state
    progress, seq_len = saved_progress(state), run.config.data.seq_len
    return StageRecord.from_state(state).at(run.place.stages, run.place.number, progress, seq_len)


def begin_stage(run: ResolvedRun, record: StageRecord) -> ResolvedRun:
    """Return the run of a stage that begins from the newest checkpoint in the run's folder."""
    assert run.place is not None
    return dataclasses.replace(run, checkpoint=checkpoint_folder(run.config), place=run.place.begun(record))


def refuse_other_tokens(before: DataNode, now: DataNode, stage: Stage) -> None:
    """Raise ConfigError if the data of a stage are cut into other tokens than those of the stage before it."""
    one, other = (None if node.tokenizer is None else node.tokenizer.fingerprint for node in (before, now))
    if before.vocabulary == now.vocabulary and (one is None or other is None or one == other):
        return
    message = "its text is cut into other tokens than that of the stage before it"
    fix = "give all stages one data.tokenizer (a tokenizer.json, or bytes), or one mixture whose weights the stages change"
    raise ConfigError([Problem(f"{stage.key}.data", message, fix)])


def release_memory(mesh: Mesh) -> None:
    """Free the memory of a stage's objects before the next stage takes as much."""
    mesh.release()
    collect_memory()


def collect_memory() -> None:
    """Free the memory of a stage or run that is over. Its objects refer to one another, so Python would free them late."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
