"""Run a resolved config, from prepared data to an exit code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..checkpoint.errors import HeldError
from ..checkpoint.lock import FolderLock
from ..config.cache import cache_folder
from ..config.per_host import after_first_on_host, is_first_on_host, share_on_host
from ..config.problems import ConfigError, Problem
from ..data.assignment import Assigner
from ..data.build import build_node, system_problem
from ..data.config import DataConfig
from ..data.node import DataNode
from ..data.samples.order import Shuffled
from ..data.summary import data_notices, data_warnings
from ..data.validation import ValidationPart
from ..data.validation_sets import ValidationSets
from ..parallel.engines import start_compiling
from ..parallel.heartbeat import Phase
from ..parallel.layout import Layout
from ..parallel.mesh import Mesh, pick_device
from .all_ranks import PeerFailed, from_main, on_main, raise_on_all_ranks
from .blanks import blank_notice
from .build import Run, build_model, build_run, engine_settings
from .derived import checkpoint_folder
from .find_checkpoint import continues_own_run
from .guard.going_back import find_way_back
from .guard.guard import RewindNeeded, TrainingDiverged
from .identity import Origin, identify, take_over_metrics
from .machine import RUN_LOCK
from .preflight.check import check_at_start
from .relations import collect_problems
from .resolve import ResolvedRun
from .resume import restore_journal, restore_run
from .schema import RunConfig
from .sides import annotated_yaml
from .signals import DIVERGED, StopRequest
from .stages.border import begin_stage, read_record, refuse_other_tokens, release_memory
from .stages.written import stage_table
from .start_summary import batch_jump, start_summary
from .tokenizer_settings import copy_settings, settings_folder
from .typed import plain_config
from .watch.rank import introduce, join_watch, write_failure

log = logging.getLogger(__name__)


def run(resolved: ResolvedRun, stop: StopRequest | None = None) -> int:
    """Train a resolved run, as one of its processes. Return the exit code.

    0  the run reached its end, or was asked to stop (SIGTERM, SIGUSR1) and saved its state
    1  it diverged, or another rank failed to start and reports why
    2  another rank found the config at fault

    Raises ConfigError for a config that can't run, before anything is touched, and any other exception that ends the run.

    stop: after the run, tells the caller whether a stop was requested
    """
    stop = stop or StopRequest()
    resolved.refuse()
    for notice in resolved.notices:
        log.info("%s", notice)
    for later in resolved.then:
        for notice in later.notices:
            log.info("%s: %s", later.place.stage.key if later.place is not None else "", notice)
    for warning in resolved.warnings:
        log.warning("%s", warning)
    config, checkpoint, parallel = resolved.config, resolved.checkpoint, resolved.config.parallel
    heartbeat = join_watch(config)
    # Before connecting: building a large corpus may take longer than the process groups' time-out.
    data, sets = prepared_stages(resolved)
    if is_first_on_host():
        model = build_model(config.model, config.model.vocabulary or data[0].vocabulary)
        start_compiling(model, parallel, engine_settings(config, model, data[0].seq_len), config.optim)
    heartbeat.beat(Phase.JOIN)
    mesh = Mesh.connect(_layout_of(resolved), pick_device(), parallel.timeout, heartbeat)
    heartbeat.beat(Phase.START)
    try:
        if mesh.differ(str(checkpoint)):
            raise RuntimeError(f"processes see different newest checkpoints (this one {checkpoint}): is the folder shared?")
        if mesh.differ(fitted := " ".join(f"{key}={value}" for key, value in _fitted(resolved))):
            raise RuntimeError(f"processes have unlike GPUs, and auto is not the same on all (here {fitted}): give these keys")
        if mesh.differ(" ".join(each.fingerprint for each in data)):
            raise RuntimeError("processes see different data: give all of them the same files (and, for stdlib, one Python)")
        code = _train(resolved, data, sets, mesh, stop)
        heartbeat.beat(Phase.END)  # not of a run that has failed: its launcher tells in which phase
        return code
    except TrainingDiverged as error:
        log.error("%s", error)
        return DIVERGED
    except PeerFailed as error:
        write_failure(error)  # so that this rank is not named in place of that other
        return 2 if error.config_error else 1
    finally:
        mesh.close()


def _fitted(resolved: ResolvedRun) -> Iterator[tuple[str, object]]:
    """Yield the keys that a plan decided on this process, of every stage, with their values."""
    for run in (resolved, *resolved.then):
        yield from run.fitted.items()


def prepared_stages(resolved: ResolvedRun) -> tuple[list[DataNode], list[list[ValidationPart]]]:
    """Build and prepare the data of the current stage and of all later ones: what is wrong with them shows before the start.

    Returns the data and the named validation sets of each stage. Raises ConfigError as `prepared_data`, and for a stage whose
    tokens are not those of the stage before it.
    """
    runs = (resolved, *resolved.then)
    found: list[DataNode] = []
    sets: list[list[ValidationPart]] = []
    for number, one in enumerate(runs):
        config = one.config
        same = number > 0 and config.data == runs[number - 1].config.data
        try:
            found.append(found[-1] if same else prepared_data(config.data, config.seed, config.model.vocabulary))
            sets.append(ValidationSets(config.validation, config.data, config.seed).parts(found[-1]))
        except ConfigError as error:
            if not number or one.place is None:
                raise
            raise ConfigError([replace(each, key=f"{one.place.stage.key}.{each.key}") for each in error.problems]) from error
        if number and one.place is not None:
            refuse_other_tokens(found[-2], found[-1], one.place.stage)
    return found, sets


def prepared_data(config: DataConfig, seed: int, vocabulary: int | None) -> DataNode:
    """Build and prepare the data. Raises ConfigError for data that can't be read, naming the file and the place.

    vocabulary: of the model; None: the data's
    """
    found = share_on_host(
        "data-problems", lambda: collect_problems("data", lambda: build_node(config, seed, vocabulary).problems())
    )
    if found:
        raise ConfigError(found)
    data = build_node(config, seed, vocabulary)
    try:
        after_first_on_host("data-files", data.prepare)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([Problem("data", str(error))]) from error
    except OSError as error:
        raise ConfigError([system_problem("data", error, cache_folder(config.cache))]) from error
    if vocabulary is not None and vocabulary < data.vocabulary:
        message = f"the model knows {vocabulary} tokens, and the data has {data.vocabulary}"
        raise ConfigError([Problem("model.vocabulary", message, f"use {data.vocabulary} or more, or null for the data's own")])
    return data


def _train(
    resolved: ResolvedRun,
    data: Sequence[DataNode],
    sets: Sequence[Sequence[ValidationPart]],
    mesh: Mesh,
    stop: StopRequest,
) -> int:
    """Train the current stage and those after it, each of which resumes from the checkpoint of the one before.

    data, sets: of each of these stages
    """
    output_dir = Path(resolved.config.output_dir)
    lock = raise_on_all_ranks(mesh, lambda: _lock_output_dir(output_dir) if mesh.is_main else None)
    try:
        if resolved.config.launch.check and resolved.world_size > 1:
            check_at_start(mesh, output_dir)
        run = resolved
        for number, node in enumerate(data):
            if number:
                release_memory(mesh)  # not after the last stage: a process that ends should not walk over all its objects
                stop.obeyed = mesh.any(stop.requested)
                if stop.obeyed:
                    if mesh.is_main:
                        log.warning("asked to stop at the border of a stage; the run goes on with resume=auto")
                    break
                following = _next_stage(resolved.then[number - 1], mesh)
                if following is None:
                    continue
                run = following
                mesh = _mesh_of(run, mesh)
            reached = None
            while reached is None:
                try:
                    reached = _run_locked(run, node, sets[number], mesh, stop)
                except RewindNeeded as needed:
                    run = _rewound(run, needed, mesh)
            if not reached:
                break
        return 0
    finally:
        stop.release()
        if lock is not None:
            lock.release()


def _rewound(run: ResolvedRun, needed: RewindNeeded, mesh: Mesh) -> ResolvedRun:
    """Return the run that goes on from an earlier checkpoint, once the journal says so."""
    release_memory(mesh)
    back = from_main(mesh, lambda: find_way_back(run, needed))
    on_main(mesh, lambda: back.journal.write(checkpoint_folder(run.config)))
    if mesh.is_main:
        log.warning("%s. The run goes back to step %d", needed.reason, back.journal.rewinds[-1].to)
    return back.apply(run)


def _next_stage(planned: ResolvedRun, mesh: Mesh) -> ResolvedRun | None:
    """Return the run of the next stage, which all ranks begin from one checkpoint; None if it has its tokens already."""
    run = begin_stage(planned, from_main(mesh, lambda: read_record(planned)))
    assert run.place is not None
    if not run.place.is_over:
        return run
    if mesh.is_main:
        log.warning(
            "%s: nothing is trained, because the step before it went past its end; its changes stay", run.place.stage.key
        )
    return None


def _layout_of(run: ResolvedRun) -> Layout:
    return Layout.plan(run.config.parallel, run.world_size, run.config.islands_on(run.world_size))


def _mesh_of(run: ResolvedRun, mesh: Mesh) -> Mesh:
    """Return the mesh of a stage's layout: the one that is there, if the layout is the same."""
    layout = _layout_of(run)
    return mesh if layout == mesh.layout else mesh.rearranged(layout)


def _run_locked(resolved: ResolvedRun, data: DataNode, sets: Sequence[ValidationPart], mesh: Mesh, stop: StopRequest) -> bool:
    """Train one stage, or a run without any. Return whether it reached its end, and nobody asked to stop."""
    config, checkpoint, place = resolved.config, resolved.checkpoint, resolved.place
    output_dir = Path(config.output_dir)
    imported = resolved.imported
    saved = {"config": plain_config(config), "choices": dict(resolved.choices), "typed": list(resolved.typed)}
    saved |= {} if imported is None else {"imported_from": dict(imported.said)}
    named = getattr(config.data, "tokenizer", None)
    settings = settings_folder(named, None if imported is None else imported.tokenizer)
    current = build_run(config, saved, data, mesh, place, sets, settings)
    try:
        origin = None if checkpoint is None else restore_run(current, checkpoint, config)
        if checkpoint is None and continues_own_run(str(config.resume), config.output_dir):  # it has not saved yet
            restore_journal(current.loop, checkpoint_folder(config))
        if mesh.is_main:
            for line in _start_lines(config, current):
                log.info("%s", line)
            _say_data(data)
            _warn_of_repetition(current)
            _warn_of_blanks(current)
            _warn_of_a_jump(current)
        nothing_left = current.loop.finished
        if nothing_left and mesh.is_main:
            at = current.loop.progress.step
            log.warning("the run is at its end already (step %d): nothing is trained; raise its length to go on", at)

        def accept() -> None:
            on_main(mesh, lambda: _take_over(config, current, origin))
            introduce(mesh, output_dir)
            if not (nothing_left and origin is not None and origin.own):  # else config.yaml would tell what trained nothing
                on_main(mesh, lambda: _write_description(config, data, output_dir, settings))

        stop.hold()  # to the end of the last stage, so that a signal at a border counts, too
        reached = _run_loop(current, stop, accept)
        if place is None or place.is_last:
            stop.release()
        # A signal after the last step does not change the run, which is over, but must still stop a sweep.
        stop.obeyed = mesh.any(stop.requested) or current.loop.stopping
        if reached and (place is None or place.is_last):
            for hook in current.loop.hooks:
                hook.on_run_end(current.loop, output_dir)
        elif (not reached or stop.obeyed) and mesh.is_main:
            on = "the run goes on with resume=auto" if current.saving is not None else "nothing was saved (checkpoint.every=0)"
            log.warning("asked to stop at step %d; %s", current.loop.progress.step, on)
        return reached and not stop.obeyed
    finally:
        current.close()


def _run_loop(current: Run, stop: StopRequest, accept: Callable[[], None]) -> bool:
    """Train, and wait for the last save. Return whether the run reached its end. accept: see `Loop.run`."""
    try:
        reached = current.loop.run(stop, accept)
    except RewindNeeded:  # likewise on all ranks
        if current.saving is not None:
            current.saving.wait(current.loop)
        current.loop.engine.finish()
        raise
    except TrainingDiverged as error:  # on all ranks at the same step: they can still complete a save
        saved = 0
        if current.saving is not None:
            current.saving.wait(current.loop)
            saved = current.saving.saved_step
        current.loop.engine.finish()
        raise TrainingDiverged(f"{error}. {_way_on(saved)}") from error
    if current.saving is not None:
        current.saving.finish(current.loop)
    current.loop.engine.finish()
    return reached


def _way_on(saved: int) -> str:
    """Word what to do after a run diverged. saved: the step of its newest checkpoint; 0: there is none."""
    place = f"Resume from step {saved}, the newest that is saved," if saved else "Nothing was saved before it, so begin anew"
    return (
        f"{place} with a lower optim.lr, a longer schedule.warmup or a smaller trainer.max_grad_norm, if the loss had been "
        "rising; if it had not, look at this step's data, trainer.float8 and the machine"
    )


def _take_over(config: RunConfig, current: Run, origin: Origin | None) -> None:
    """Take over the run's folders: move files of an earlier run aside. Called once nothing can refuse this run any more."""
    resumes = continues_own_run(str(config.resume), config.output_dir)
    identity = identify(origin, checkpoint_folder(config), resumes=resumes)
    take_over_metrics(Path(config.output_dir), identity)
    assert current.loop.guard is not None
    current.loop.guard.journal.begin(checkpoint_folder(config))
    if current.saving is not None:
        own = origin if origin is not None and origin.own else None
        current.saving.begin_run(identity, 0 if own is None else own.commit, None if own is None else own.step)


def _write_description(config: RunConfig, data: DataNode, output_dir: Path, settings: Path | None) -> None:
    """Write the whole config and the tokenizer into the run's folder. settings: the folder with those of the tokenizer."""
    (output_dir / "config.yaml").write_text(annotated_yaml(config))
    if data.tokenizer is not None:
        data.tokenizer.save(output_dir / "tokenizer.json")  # for `meshloom generate`, wherever the checkpoints go
        copy_settings(settings, output_dir)


def _start_lines(config: RunConfig, run: Run) -> Iterator[str]:
    """Yield what to say at the start of a run, or of a stage: the table of stages first."""
    if run.place is not None:
        yield from stage_table(run.place.stages, run.place.number)
    yield from start_summary(config, run)


def _say_data(data: DataNode) -> None:
    for notice in data_notices(data):
        log.info("%s", notice)
    for warning in data_warnings(data):
        log.warning("%s", warning)


def _warn_of_repetition(run: Run) -> None:
    samples, batch = run.data.train(), run.loop.controller.samples
    if isinstance(samples, Shuffled) and samples.epoch_size < batch:
        log.warning("the data has %d samples, fewer than a batch of %d: every step repeats some", samples.epoch_size, batch)


def _warn_of_a_jump(run: Run) -> None:
    if (jump := batch_jump(run)) is not None:
        log.warning("batch: %s", jump)


def _warn_of_blanks(run: Run) -> None:
    dealer = run.loader.dealer
    notice = blank_notice(dealer, run.loop.controller, run.loop.progress) if isinstance(dealer, Assigner) else None
    if notice is not None:
        log.warning("batch.samples: %s", notice)


def _lock_output_dir(output_dir: Path) -> FolderLock:
    """Create the run's folder and lock it for this run. Raises ConfigError."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        return FolderLock(output_dir, RUN_LOCK, "writing")
    except OSError as error:
        message = f"'{output_dir}' can't be written to: {error.strerror}"
        raise ConfigError([Problem("output_dir", message, "give a folder to write to")]) from error
    except HeldError as error:
        raise ConfigError([Problem("output_dir", str(error))]) from error
