"""Resume from a checkpoint: load its state into a freshly built run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..checkpoint.manifest import Manifest
from ..checkpoint.rebuild import KindOf
from ..checkpoint.restore import Chooser, RestoreReport, Wanted, read_state, restore
from ..config.nodes import find_option
from ..config.problems import ConfigError, Problem
from ..data.config import OPTIONS
from ..data.node import DataNode
from ..data.version import rules_version
from ..parallel.engine import Engine
from ..parallel.fragment import REMAINDER, Fragment
from ..parallel.mesh import Mesh
from ..parallel.torch.islands import for_islands_of, is_of_absent_island
from .all_ranks import from_main
from .build import Run, build_control
from .checkpoint_fit import optimizer_change
from .derived import checkpoint_folder
from .find_checkpoint import is_import, is_inside, is_named, saved_progress
from .guard.journal import read_journal
from .hooks.base import hooks_by_name
from .hooks.rebuilt_history import RebuiltHistory
from .identity import Origin, is_own
from .loop import Loop
from .resumed_config import saved_islands
from .schema import RunConfig
from .stages.record import Place, StageRecord

log = logging.getLogger(__name__)


def restore_run(run: Run, checkpoint: Path | str, config: RunConfig) -> Origin:
    """Load a checkpoint's arrays and counters into a freshly built run; from an import (fine-tuning), only the weights.

    Under `checkpoint.strict`, raises CheckpointError for optimizer state that does not fit. Otherwise what fits is loaded and
    the rest is logged; another optimizer begins its state anew.
    """
    loop, folder = run.loop, checkpoint_folder(config)
    stated = from_main(loop.mesh, lambda: read_state(checkpoint))
    refuse_another_tokenizer(stated, run.data, checkpoint)
    if is_import(stated):
        report = restore_weights(loop.engine, loop.mesh, checkpoint, run.place)
        return Origin(report.run, report.step, report.commit, own=False)
    _same_rules(stated, run.data, checkpoint)
    restore_journal(loop, checkpoint, stated)
    change, rebuild = optimizer_change(stated, config), _kinds_to_rebuild(checkpoint, config)
    if change is not None:
        report = restore_weights(loop.engine, loop.mesh, checkpoint, run.place, rebuild=rebuild)
        if loop.mesh.is_main:
            log.warning("optim: the state of %s is left out, and that of %s begins anew", *change)
    else:
        loop.engine.prepare_restore()
        wanted = _chooser(loop, elastic=config.optim.local.quorum is not None)
        report = _restore(loop.mesh, checkpoint, wanted, run.place, strict=config.checkpoint.strict, rebuild=rebuild)
        _refuse_other_weights(loop.mesh, checkpoint, report)
        _load_counters(loop, report)
    state = report.state
    loop.progress = saved_progress(state)
    _same_stage(run, state, checkpoint)
    begins = run.place is not None and _begins(run.place, state)
    if state["data_fingerprint"] != run.data.fingerprint and not begins:
        samples = state["progress"]["samples"]
        log.warning("the data differs from the checkpoint's: the run goes on at sample %d of the new data", samples)
    # Under a measuring controller a resumed run keeps its current batch size, whatever chose it.
    if not (begins and run.place is not None and run.place.begins("batch")):
        loop.controller.load_state_dict({"target": loop.progress.batch, **state["controller"]})
    _restore_guard(run, state, anew=begins or bool(report.rebuilt))
    own = is_inside(checkpoint, folder) and from_main(loop.mesh, lambda: is_own(report.run, folder))
    hooks = hooks_by_name(loop.hooks)
    if own and run.saving is not None:
        run.saving.keep_states({name: saved for name, saved in state["hooks"].items() if name not in hooks})
    for name, hook in hooks.items():
        if own or not hook.of_one_run:
            hook.load_state_dict(state["hooks"].get(name, {}))
    _note_rebuilt(loop, report)
    return Origin(report.run, report.step, report.commit, own)


def _kinds_to_rebuild(checkpoint: Path | str, config: RunConfig) -> KindOf | None:
    """Return the kinds of the model's layers, where those that a step has lost are to be rebuilt.

    Only of the step that the user has named: a run that goes back to another one by itself rebuilds nothing.
    """
    shape = config.model.decoder()
    if config.checkpoint.lost_layers != "neighbours" or shape is None or not is_named(checkpoint, config.resume):
        return None
    return shape.layer_type


def _chooser(loop: Loop, *, elastic: bool) -> Chooser:
    """Return what says which of the run's arrays a step is read into: steps of one run may be of other islands.

    elastic: whether islands may be lost and come (`optim.local.quorum`), so that a step need not hold all islands of today,
    nor the run have all islands of the step
    """
    mine, present = list(loop.engine.fragments()), loop.mesh.layout.islands
    statistics = [] if loop.island_statistics is None else list(loop.island_statistics.to_restore())

    def choose(manifest: Manifest) -> Wanted:
        gone = {key for key in manifest.arrays if elastic and is_of_absent_island(key, present)}
        islands = for_islands_of(mine, saved_islands(manifest.state), elastic=elastic)
        return Wanted([*islands, *(each for each in statistics if each.key in manifest.arrays)], gone)

    return choose


def restore_journal(loop: Loop, checkpoint: Path | str, state: dict[str, Any] | None = None) -> None:
    """Take over the rewinds of the journal beside a checkpoint and of its state: their samples stay left out."""
    assert loop.guard is not None
    rewinds = list((state or {}).get("rewinds", []))
    found = from_main(loop.mesh, lambda: read_journal(checkpoint))
    loop.guard.journal.add([*rewinds, *found])


def _note_rebuilt(loop: Loop, report: RestoreReport) -> None:
    """Tell the hook that keeps it of layers that the step had lost."""
    for hook in loop.hooks if report.rebuilt else ():
        if isinstance(hook, RebuiltHistory):
            hook.add(report.step, report.rebuilt, report.damage)


def _restore_guard(run: Run, state: dict[str, Any], *, anew: bool) -> None:
    """Load the statistic of past steps, of this island. One that the checkpoint does not know begins it anew.

    anew: whether the loss is on another level: a stage has begun, or layers were lost
    """
    guard = run.loop.guard
    assert guard is not None
    same_data = not anew and state["data_fingerprint"] == run.data.fingerprint
    statistics = run.loop.island_statistics
    own = state.get("guard") if statistics is None or run.loop.mesh.island_number == 0 else statistics.restored()
    if own is not None and same_data:
        guard.load_state_dict(own)
    guard.suspect_rewound(run.loop.progress.step)
    if guard.journal.left_out and run.loop.mesh.is_main:
        log.info("%d samples of the data are left out, by %d rewinds", guard.journal.left_out, len(guard.journal.rewinds))


def _begins(place: Place, state: dict[str, Any]) -> bool:
    """Return whether the stage begins from this checkpoint, which an earlier stage saved."""
    return len(StageRecord.from_state(state).begun) <= place.number


def _same_stage(run: Run, state: dict[str, Any], checkpoint: Path | str) -> None:
    """Raise ConfigError if a damaged checkpoint made the run fall back on one of an earlier stage, whose config it has not."""
    place, tokens = run.place, run.loop.progress.tokens
    if place is None or tokens >= place.stage.begin:
        return
    message = f"the newest whole checkpoint in '{checkpoint}' is of step {state['progress']['step']}, in an earlier stage"
    raise ConfigError([Problem("resume", message, "name it: resume=<its step-… folder>, with a new output_dir")])


def _load_counters(loop: Loop, report: RestoreReport) -> None:
    """Load the optimizer's counters, and say what of its state does not fit."""
    saved, known = report.state["counters"], loop.engine.counters()
    lost = [*report.missing, *report.mismatched, *report.unused, *(known.keys() ^ saved.keys())]
    if loop.mesh.is_main and lost:
        named = ", ".join(sorted({key.split("/")[0] for key in lost}))
        log.warning("begun anew or left out, because it does not fit: %s", named)
    loop.engine.load_counters({name: value for name, value in saved.items() if name in known})


def refuse_another_tokenizer(state: dict[str, Any], data: DataNode, checkpoint: Path | str) -> None:
    """Raise ConfigError if the data's tokenizer is not the one that the model was trained with."""
    saved, now = state.get("tokenizer"), None if data.tokenizer is None else data.tokenizer.fingerprint
    if saved is None or now is None or saved == now:
        return
    message = f"the text is cut into other tokens than '{checkpoint}' was trained on"
    fix = "use its own: data.tokenizer=<its output_dir>/tokenizer.json, of an import <its step>/tokenizer.json"
    raise ConfigError([Problem("data.tokenizer", message, fix)])


def _same_rules(state: dict[str, Any], data: DataNode, checkpoint: Path | str) -> None:
    """Raise ConfigError if data of a user's own class make samples by other rules than they did (`data/version.py`).

    Of Meshloom's own classes the config keeps the version, and another one is typed.
    """
    path, keys = state["config"]["data"].get("_target_"), state["config"]["data"]
    saved, now = state.get("data_version", 1), rules_version(data)
    if find_option(OPTIONS, path) is not None or "version" in keys or None in (saved, now) or saved == now:
        return
    message = f"the samples of '{checkpoint}' were made by version {saved} of the rules, and {path} makes them by version {now}"
    fix = f"let the class hand version={saved} to CorpusConfig, or go on with other samples by a new run (resume=null)"
    raise ConfigError([Problem("data.version", message, fix)])


def _restore(
    mesh: Mesh,
    checkpoint: Path | str,
    wanted: Chooser,
    place: Place | None,
    *,
    strict: bool,
    rebuild: KindOf | None = None,
) -> RestoreReport:
    """Restore on all ranks. Each byte is read by one rank, which sends it to others through a temporary process group.

    Weights that are stored without their remainders have none: those of the initial weights must not be added to them.
    """
    group = dist.new_group(backend="gloo") if mesh.layout.world_size > 1 else None
    assert not isinstance(group, int), "every process is a member"
    fragments: list[Fragment] = []

    def choose(manifest: Manifest) -> Wanted:
        found = wanted(manifest)
        fragments[:] = found.fragments  # of the step that is tried last: that which is restored
        return found

    try:
        control = build_control(mesh, "restore", place)
        report = restore(checkpoint, choose, control, strict=strict, rebuild=rebuild, group=group)
    finally:
        if group is not None:
            dist.destroy_process_group(group)
    absent = set(report.missing)
    for fragment in fragments:
        if fragment.role == REMAINDER and fragment.key in absent:
            fragment.tensor.zero_()
    return report


def restore_weights(
    engine: Engine, mesh: Mesh, checkpoint: Path | str, place: Place | None = None, *, rebuild: KindOf | None = None
) -> RestoreReport:
    """Load a checkpoint's weights, with their remainders, on every rank: the optimizer's state stays fresh.

    rebuild: kinds of the layers, where those that are lost are made of those beside them (`restore`)

    Raises ConfigError on all ranks if some don't fit.
    """
    weights = [fragment for fragment in engine.fragments() if fragment.role in ("weight", REMAINDER)]
    report = _restore(mesh, checkpoint, lambda _: Wanted(weights), place, strict=False, rebuild=rebuild)
    _refuse_other_weights(mesh, checkpoint, report)
    engine.load_counters(engine.counters())
    return report


def _refuse_other_weights(mesh: Mesh, checkpoint: Path | str, report: RestoreReport) -> None:
    """Raise ConfigError on all ranks for a weight that the checkpoint lacks, has in another shape, or has left over."""
    absent, left = (
        sorted(key for key in keys if key.startswith("weight/"))
        for keys in ({*report.missing, *report.mismatched}, report.unused)
    )
    if mesh.any(bool(absent or left)):
        message = f"'{checkpoint}' does not have this model's weights{_named(absent)}"
        if left and not absent:
            message = f"'{checkpoint}' has weights that this model does not have{_named(left)}"
        raise ConfigError([Problem("resume", message, "choose the model whose weights they are")])


def _named(keys: list[str]) -> str:
    return f" ({', '.join(keys[:4])}{', …' if len(keys) > 4 else ''})" if keys else ""
