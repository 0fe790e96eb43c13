"""One run, from its config to its exit code."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..config.problems import ConfigError
from ..data.node import DataNode
from ..parallel.layout import Layout
from ..parallel.mesh import Mesh, environment_world_size, pick_device
from .build import Parts, build_data, build_run
from .loop import TrainingDiverged
from .resume import effective, restore_run
from .signals import StopRequest
from .validate import run_problems

log = logging.getLogger(__name__)


def run(config: DictConfig, overrides: Sequence[str] = ()) -> int:
    """Train as `config` says, on the processes that this one was started among. Returns the exit code.

    0 if the run reached its end, or was asked to stop (SIGTERM, SIGUSR1) and saved its state; 1 if it diverged. Raises
    ConfigError, before anything is touched, for a config that can't run, and whatever else makes a run fail.

    overrides: those of the command line that `config` was composed of; a resumed run applies them to its saved config.
    """
    config, checkpoint = effective(config, overrides)
    problems = run_problems(config, environment_world_size())
    if problems:
        raise ConfigError(problems)
    data = build_data(config)
    data.prepare()  # before the process groups: building a large corpus may take longer than their time-out
    parallel = Parts.of(config).parallel
    mesh = Mesh.connect(Layout.plan(parallel, environment_world_size()), pick_device(), parallel.timeout)
    try:
        if mesh.differ(str(checkpoint)):
            raise RuntimeError(f"processes see different newest checkpoints (this one {checkpoint}): is the folder shared?")
        if mesh.differ(data.fingerprint):
            raise RuntimeError("processes see different data: give all of them the same files (and, for stdlib, one Python)")
        return _train(config, data, mesh, checkpoint)
    except TrainingDiverged as error:
        log.error("%s", error)
        return 1
    finally:
        mesh.close()


def _train(config: DictConfig, data: DataNode, mesh: Mesh, checkpoint: Path | str | None) -> int:
    output_dir = Path(config.output_dir)
    if mesh.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    current = build_run(config, data, mesh)
    try:
        if checkpoint is not None:
            restore_run(current, checkpoint)
        with StopRequest() as stop:
            reached = current.loop.run(stop)
            if current.saving is not None:
                current.saving.finish(current.loop)
        if reached:
            for hook in current.loop.hooks:
                hook.on_run_end(current.loop, output_dir)
        elif mesh.is_main:
            log.warning("asked to stop at step %d; the run goes on with resume=auto", current.loop.progress.step)
        return 0
    finally:
        current.close()
