"""`meshloom train`, and the same under torchrun: compose the config, refuse what can't run, then train or start torchrun.

meshloom train recipe=quickstart launch.nproc=4
torchrun --nproc-per-node 4 -m meshloom.launch.train recipe=quickstart
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser  # private, but the one that hydra.main itself reads its switches with
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ..config.compose import HYDRA_VERSION, RECIPES, ROOT, opened, quoted, sweep_folder, task_overrides
from ..config.problems import ConfigError, Problem
from ..trainer.schema import make_composer, register_schemas
from ..trainer.signals import AT_ONCE, StopRequest, show_cursor
from .forked import RANK
from .torchrun import PreparedAgent, TorchRun, with_share

BAD_CONFIG = 2
FRAMES = 4  # of the way to an error that are told: a library's own, and who called it
# What a disk, a quota or a file server answers, or something in a file's place: a line says it, and where it came up.
UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as this command line says. Returns the exit code: 0 only if every run ended as asked, 2 for a bad config.

    A signal that stops one run of a sweep stops the sweep: those after it are not begun, and the code says so as a shell would
    (128 + the signal's number). A run by itself that was asked to stop, and has saved, ended as asked: its code is 0, by which
    torchrun and SLURM know that it did not fail.
    """
    switches, arguments = _read(sys.argv[1:] if argv is None else argv)
    register_schemas()
    several = _starts_several(switches)
    agent = PreparedAgent(with_share(several)) if several else None
    try:
        try:
            _check(switches)
        except ConfigError as error:
            return _refuse(error)
        return _begin(switches, arguments, agent)
    finally:
        if agent is not None:
            agent.dismiss()


def _begin(switches: argparse.Namespace, arguments: list[str], agent: PreparedAgent | None) -> int:
    """What `main` does once all is checked. agent: for the processes of the one run, if it has several."""
    codes: list[int] = []
    left = 0
    stop = StopRequest(_leave)
    launcher = os.getpid()

    def task(config: DictConfig) -> None:
        nonlocal left
        if stop.obeyed:  # it was not one run of the sweep that somebody wanted to end
            left += 1
            return
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a failed run shows where it failed
        code = _run(config, switches, stop, agent)
        if os.getpid() != launcher:  # Hydra's submitit launcher: of what a job does only an exception comes back
            if code:
                raise RuntimeError(f"the run in {config.output_dir} ended with exit code {code}")
            if stop.obeyed:
                raise RuntimeError(f"the run in {config.output_dir} was asked to stop; resume=auto goes on with it")
        codes.append(code)

    sys.argv = ["meshloom train", *arguments]
    hydra.main(version_base=HYDRA_VERSION, config_path=RECIPES, config_name=ROOT)(task)()
    if left:
        print(f"asked to stop: {left} of {left + len(codes)} runs of the sweep were not begun", file=sys.stderr)
    failed = [number for number, code in enumerate(codes) if code]
    if failed and len(codes) > 1:
        print(f"{len(failed)} of {len(codes)} runs of the sweep failed: {failed}", file=sys.stderr)
    if switches.multirun and stop.obeyed and not under_torchrun():  # which would take the code for a failure, and restart it
        codes.append(128 + stop.number)
    return max(codes, default=0)


def _read(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's switches, and the arguments for Hydra, which wants the overrides in one row: switches go in front."""
    arguments = [opened(argument) for argument in argv]
    switches = get_args_parser().parse_intermixed_args(arguments)
    in_front = [argument for argument in arguments if argument not in switches.overrides]
    return switches, [*in_front, *switches.overrides]


def _check(switches: argparse.Namespace) -> None:
    """Refuse every job of this command line that can't be composed or, if it is to run, can't run."""
    modes = {"--run": switches.run, "-m": switches.multirun, "--cfg": switches.cfg, "--info": switches.info}
    chosen = [name for name, value in modes.items() if value]
    if len(chosen) > 1:
        raise ConfigError([Problem(" ".join(chosen), "exclude one another", "give one of them")])
    if switches.help or switches.hydra_help or switches.shell_completion or switches.experimental_rerun:
        return
    if switches.config_name or switches.config_path:
        fix = "name a recipe of your own with --config-dir and recipe=…"
        raise ConfigError([Problem("--config-name, --config-path", "the root of every config is Meshloom's", fix)])
    composer = make_composer(switches.config_dir)
    jobs = composer.expand(switches.overrides) if switches.multirun else [switches.overrides]
    problems: list[Problem] = []
    for overrides in jobs:
        composition = composer.compose(overrides)
        found = composition.problems
        if switches.cfg is None and switches.info is None:
            from ..trainer.resume import effective
            from ..trainer.validate import run_problems

            config = composition.config if found else effective(composition.config, overrides)[0]
            found = [*found, *run_problems(config, processes(config)), *_machine(config)]
        problems += [problem for problem in found if problem not in problems]
    if problems:
        raise ConfigError(problems)


def _refuse(error: ConfigError) -> int:
    """Print problems that every process finds in the same way."""
    if os.environ.get("RANK", "0") == "0":
        print(error, file=sys.stderr)
    return BAD_CONFIG


def under_torchrun() -> bool:
    """Whether this process is one of several (or one) that torchrun, or a scheduler in its manner, started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _starts_several(switches: argparse.Namespace) -> int:
    """How many processes torchrun is to start for this command line, if it is for one run, as far as that shows without
    importing PyTorch; 0 for a run in this process, and for several runs.
    """
    only_looks = switches.help or switches.hydra_help or switches.shell_completion or switches.cfg or switches.info
    if under_torchrun() or switches.multirun or only_looks or switches.experimental_rerun:
        return 0
    try:
        composition = make_composer(switches.config_dir).compose(switches.overrides)
    except ConfigError:  # as `_check` will say
        return 0
    if composition.problems:
        return 0
    asked, restarts = composition.config.launch.nproc, composition.config.launch.max_restarts
    if asked == "auto":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        asked = len(list(Path("/dev").glob("nvidia[0-9]*")) if visible is None else visible.split(","))
    if not isinstance(asked, int):
        return 0
    return max(asked, 0) if asked > 1 or (isinstance(restarts, int) and restarts > 0) else 0


def processes(config: DictConfig) -> int:
    """Number of processes of the run: torchrun's if that started this one, otherwise what `launch.nproc` asks for.

    0 for a `launch.nproc` that is no number; `run_problems` names it.
    """
    if under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    asked = config.launch.nproc
    if asked == "auto":
        import torch

        return max(1, torch.cuda.device_count())
    return asked if isinstance(asked, int) and not isinstance(asked, bool) else 0


def _machine(config: DictConfig) -> Iterator[Problem]:
    """What this machine can't do."""
    import torch

    local = int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else processes(config)
    gpus = torch.cuda.device_count()
    if 0 < gpus < local:
        fix = f"start at most {gpus}, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        yield Problem("launch.nproc", f"{local} processes for {gpus} GPU{'s' * (gpus > 1)}", fix)
    if os.environ.get("RANK", "0") == "0":  # the process that writes
        if config.logging.wandb:
            from ..trainer.hooks.loggers.weights_and_biases import wandb_problems

            yield from wandb_problems()
        yield from _unwritable("output_dir", config.output_dir)
        if config.checkpoint.folder is not None and "://" not in config.checkpoint.folder:
            yield from _unwritable("checkpoint.folder", config.checkpoint.folder)
        yield from _taken(config)
    if not under_torchrun() and config.launch.nodes != 1:
        fix = "use `meshloom slurm`, or start torchrun on every node"
        yield Problem("launch.nodes", "`meshloom train` starts the processes of one node", fix)
    from ..trainer.resume import goes_on

    if not under_torchrun() and config.launch.max_restarts and not goes_on(str(config.resume)):
        from ..checkpoint.folder import find_latest
        from ..trainer.build import checkpoint_folder

        try:
            earlier = find_latest(checkpoint_folder(config))
        except OSError as error:
            fix = "give a folder, or a store, that can be"
            yield Problem("checkpoint.folder", f"'{checkpoint_folder(config)}' can't be read: {error}", fix)
            return
        if earlier is not None:  # a restart before the first save could not tell them from its own
            message = f"restarted processes would go on from '{earlier}', which an earlier run saved"
            yield Problem("launch.max_restarts", message, "use resume=auto to go on with it, or another output_dir")


def _taken(config: DictConfig) -> Iterator[Problem]:
    """Folders that another run of this machine has. The run takes them itself, but only when its data are there."""
    from ..checkpoint.files import is_remote
    from ..checkpoint.lock import LOCK, holder_of, refusal
    from ..trainer.build import checkpoint_folder
    from ..trainer.run import RUN_LOCK

    asked = [("output_dir", str(config.output_dir), RUN_LOCK, "writing")]
    folder = checkpoint_folder(config)
    if config.checkpoint.every != 0 and not is_remote(folder):
        asked.append(("checkpoint.folder", folder.removeprefix("file://"), LOCK, "saving"))
    for key, place, name, doing in asked:
        with contextlib.suppress(OSError):  # which `_unwritable` has said
            if (holder := holder_of(Path(place), name)) is not None:
                yield Problem(key, refusal(Path(place), doing, holder))


def _unwritable(key: str, folder: str) -> Iterator[Problem]:
    """Whether a folder, or the one that it would be made in, can't be written to."""
    place = Path(folder).absolute()
    try:
        while not _exists(place):
            place = place.parent
    except OSError as error:
        yield Problem(key, f"'{folder}' can't be made: {error.strerror}", "give a folder to write to")
        return
    if not place.is_dir():
        yield Problem(key, f"'{place}' is not a folder", "give a folder, or the name of a new one")
    elif not os.access(place, os.W_OK | os.X_OK):
        yield Problem(key, f"'{place}' can't be written to", "give a folder of your own")


def _exists(path: Path) -> bool:
    """Raises OSError where that can't be told: a name too long for a file, a folder that nobody may look into."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _run(config: DictConfig, switches: argparse.Namespace, stop: StopRequest, agent: PreparedAgent | None) -> int:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        config.output_dir = f"{config.output_dir}/sweep/{sweep_folder(switches.overrides, task_overrides())}"
    OmegaConf.resolve(config)
    count = processes(config)
    if (count > 1 or config.launch.max_restarts) and not under_torchrun():
        return _start_torchrun(config, count, switches, stop, agent)
    from ..checkpoint.errors import CheckpointError
    from ..data.shards import ShardError
    from ..trainer.run import run

    _configure_log()
    try:
        return run(config, task_overrides(), stop)
    except (ConfigError, CheckpointError, ShardError) as error:
        code, message = BAD_CONFIG if isinstance(error, ConfigError) else 1, str(error)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        code, message = 1, f"{error.filename or config.output_dir}: {error.strerror} ({_where(error)})"
    # What only the data or this very process could show, so every process speaks for itself.
    print(f"rank {os.environ['RANK']}: {message}" if under_torchrun() else message, file=sys.stderr)
    return code


def _where(error: BaseException) -> str:
    """The innermost lines of the program that an error came through: whose file it was, or which of them is at fault."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    return "in " + ", ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))


def _leave() -> None:
    """End this process now, for a second Ctrl-C. Nothing is put in order: a save under way may take minutes, what is on the
    disk is whole at any moment, and the end of the interpreter would abort threads that are still copying.
    """
    with contextlib.suppress(Exception):  # the signal may have come in the middle of a print
        sys.stdout.flush()
    show_cursor()
    with contextlib.suppress(OSError):
        os.write(2, b"meshloom train: interrupted\n")
    os._exit(AT_ONCE)


def _configure_log() -> None:
    """Meshloom's own messages go to stderr as they are: all of rank 0's, warnings of the others."""
    log = logging.getLogger("meshloom")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


def _start_torchrun(
    config: DictConfig, count: int, switches: argparse.Namespace, stop: StopRequest, agent: PreparedAgent | None
) -> int:
    folder = [f"--config-dir={switches.config_dir}"] if switches.config_dir else []
    overrides = [line for line in task_overrides() if not line.startswith("output_dir=")]
    started = TorchRun(
        [
            "--standalone",
            f"--nproc-per-node={count}",
            f"--max-restarts={config.launch.max_restarts}",
            "-m",
            RANK,
            *folder,
            *overrides,
            f"output_dir={quoted(str(config.output_dir))}",
        ]
    )
    code = started.run(agent)
    stop.obeyed, stop.number = started.asked, started.number
    return code


if __name__ == "__main__":
    sys.exit(main())
