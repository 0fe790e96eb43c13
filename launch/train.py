"""`meshloom train`: resolve the run, refuse a bad config, then train here or start torchrun. Sweeps go through Hydra.

meshloom train recipe=quickstart launch.nproc=4
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from ..config.compose import HYDRA_VERSION, LAUNCHERS, RECIPES, ROOT, Composer, Composition
from ..config.overrides import quoted
from ..config.problems import ConfigError, Problem
from ..config.sweeps import without_output_dir
from ..trainer.host_memory import compare_host_memory
from ..trainer.launching import LaunchConfig, all_processes, restarts, run_processes, under_torchrun
from ..trainer.machine import machine_problems, unusable_gpus
from ..trainer.machine_gpus import machine_here
from ..trainer.resolve import ResolvedRun, ResolveOptions, resolve, resolve_composed
from ..trainer.schema import RunConfig, make_composer, register_schemas
from ..trainer.signals import INTERRUPTED, StopRequest, show_cursor
from .exit_codes import BAD_CONFIG
from .newest_step import write_newest_step
from .nodes.part import Part, Rules
from .nodes.placement import place
from .nodes.refusals import write_refusal
from .rank import run_here
from .switches import read_switches, refuse
from .torchrun import RANK, PreparedAgent, TorchRun, say_starting, with_share

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["BAD_CONFIG", "main"]

RESOLVING = ResolveOptions(lambda config: all_processes(config.launch), more=machine_problems, machine=machine_here)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as this command line says. Return the exit code: 0 if every run succeeded, 2 for a bad config.

    A signal that stops one run of a sweep stops the sweep: later runs are not started, and the code is 128 + the signal's
    number, as of a shell. A single run that was asked to stop and has saved succeeded: its code is 0, so that torchrun and
    SLURM don't take it for a failure.
    """
    try:
        switches, arguments = read_switches(sys.argv[1:] if argv is None else argv)
        _refuse_switches(switches)
        if _prints_only(switches):
            return _look(switches, arguments)
        if switches.multirun:
            return _sweep(switches)
        composer = make_composer(switches.config_dir)
        composition = composer.compose(switches.overrides)
    except ConfigError as error:
        return refuse(error)
    return _single(switches, composer, composition)


def _refuse_switches(switches: argparse.Namespace) -> None:
    """Raise ConfigError for switches that exclude one another, or that Meshloom does not take."""
    modes = {"--run": switches.run, "-m": switches.multirun, "--cfg": switches.cfg, "--info": switches.info}
    chosen = [name for name, value in modes.items() if value]
    if len(chosen) > 1:
        raise ConfigError([Problem(" ".join(chosen), "exclude one another", "give one of them")])
    if switches.config_name or switches.config_path:
        fix = "name a recipe of your own with --config-dir and recipe=…"
        raise ConfigError([Problem("--config-name, --config-path", "the root of every config is Meshloom's", fix)])


def _prints_only(switches: argparse.Namespace) -> bool:
    """Return whether Hydra is only to print something, or to run a job again from its own files."""
    asks = (switches.hydra_help, switches.shell_completion, switches.experimental_rerun)
    return any(asks) or switches.cfg is not None or switches.info is not None


def _look(switches: argparse.Namespace, arguments: list[str]) -> int:
    """Print what the switches ask for, if the command line can be composed: the run's config here, all else by Hydra."""
    if switches.cfg is not None or switches.info is not None:
        composition = make_composer(switches.config_dir).compose(switches.overrides)
        if composition.problems:
            raise ConfigError(composition.problems)
        if switches.cfg == "job" and not switches.package:
            print(OmegaConf.to_yaml(composition.config, resolve=switches.resolve), end="")
            return 0
    _hydra(arguments, _nothing)
    return 0


def _nothing(config: DictConfig) -> None:
    """Run nothing: Hydra has printed what was asked for."""


def _hydra(arguments: list[str], task: Any) -> None:
    import hydra

    register_schemas()
    sys.argv = ["meshloom train", *arguments]
    hydra.main(version_base=HYDRA_VERSION, config_path=RECIPES, config_name=ROOT)(task)()


def _single(switches: argparse.Namespace, composer: Composer, composition: Composition) -> int:
    """Run once, here or under torchrun, whose agent imports modules while the run is built on trial."""
    agent: PreparedAgent | None = None

    def prepare(config: RunConfig) -> None:
        nonlocal agent
        if several := processes_for_torchrun(config.launch):
            agent = PreparedAgent(with_share(several))
            _say_starting(config)

    try:
        resolved = resolve_composed(composer, composition, switches.overrides, replace(RESOLVING, before_building=prepare))
        problems = resolved.problems or start_problems(resolved)
        if problems:
            return _refuse_run(ConfigError(problems), resolved.config)
        stop = StopRequest(_leave)
        code = _run(resolved, switches.overrides, switches.config_dir, stop, agent)
        write_newest_step(resolved.config)
        return code
    finally:
        if agent is not None:
            agent.dismiss()


def _say_starting(config: RunConfig) -> None:
    if config.logging.progress:
        say_starting(run_processes(config.launch), config.launch.most_nodes)


def start_problems(resolved: ResolvedRun) -> list[Problem]:
    """Return what keeps this machine from starting a run without other problems, and warn of what may end it.

    Each process that is started resolves the command line again, but does not ask this. Memory is not compared where another
    program started the processes: how many of them are on this machine, and what they may take, is its business.
    """
    if (problems := unusable_gpus(resolved.config)) or under_torchrun():
        return problems
    compared = [compare_host_memory(each.config) for each in (resolved, *resolved.then)]
    for warning in dict.fromkeys(warning for _, warning in compared if warning):
        print(warning, file=sys.stderr)
    return list(dict.fromkeys(problem for problems, _ in compared for problem in problems))


def _refuse_run(error: ConfigError, config: RunConfig) -> int:
    """Print problems and return the exit code. Of a run on several machines, tell the others that this one does not come."""
    tell_other_machines(error, config)
    return refuse(error)


def tell_other_machines(error: ConfigError, config: RunConfig) -> None:
    """Tell the other machines of a run on several, if there are any, that this one does not come."""
    if config.launch.most_nodes > 1 and not under_torchrun():
        write_refusal(Path(config.output_dir), str(error.problems[0]))


def processes_for_torchrun(launch: LaunchConfig) -> int:
    """Return the number of processes for an agent to start on this machine; 0 for a run in this process."""
    count, all_of_them = run_processes(launch), all_processes(launch)
    return count if not under_torchrun() and (all_of_them > 1 or restarts(launch, count) > 0) else 0


def _sweep(switches: argparse.Namespace) -> int:
    """Run every job of a sweep. All jobs are checked first, and at the end each has a line that says how it went.

    A launcher other than Hydra's own may use other machines: only there can a job know what the machine has.
    """
    from .sweep import run_sweep

    composer = make_composer(switches.config_dir)
    problems: list[Problem] = []
    here = not any(word.startswith(f"{LAUNCHERS}=") and word != f"{LAUNCHERS}=basic" for word in switches.overrides)
    for job in composer.expand(switches.overrides):
        resolved = resolve(job, RESOLVING, switches.config_dir)
        found = resolved.problems or (start_problems(resolved) if here else ())
        problems += [problem for problem in found if problem not in problems]
    if problems:
        raise ConfigError(problems)
    stop = StopRequest(_leave)

    def run(overrides: list[str]) -> tuple[int | None, int]:
        if stop.obeyed:  # a signal stops the whole sweep
            return None, 0
        resolved = resolve(overrides, RESOLVING, switches.config_dir)
        if found := resolved.problems or (() if here else start_problems(resolved)):
            return refuse(ConfigError(found)), 0
        code = _run(resolved, overrides, switches.config_dir, stop, None)
        return code, int(stop.number) if stop.obeyed else 0

    outcomes = run_sweep(switches.overrides, switches.config_dir, run)
    print("\n".join(["results of the sweep:", *(f"  {outcome}" for outcome in outcomes)]))
    left = sum(outcome.code is None for outcome in outcomes)
    if left:
        print(f"asked to stop: {left} of {len(outcomes)} runs of the sweep were not begun", file=sys.stderr)
    failed = [outcome for outcome in outcomes if outcome.code]
    if failed and len(outcomes) > 1:
        print(f"{len(failed)} of {len(outcomes)} runs of the sweep failed", file=sys.stderr)
    for outcome in failed:
        print(f"the run in {outcome.folder} ended with exit code {outcome.code}", file=sys.stderr)
    stopped = [outcome for outcome in outcomes if outcome.stop]
    for outcome in stopped:
        print(f"the run in {outcome.folder} was asked to stop; resume=auto goes on with it", file=sys.stderr)
    codes = [outcome.code or 0 for outcome in outcomes]
    if not under_torchrun():  # torchrun would take the code for a failure, and restart
        codes += [128 + outcome.stop for outcome in stopped]
    return max(codes, default=0)


def _run(
    resolved: ResolvedRun, overrides: Sequence[str], config_dir: str | None, stop: StopRequest, agent: PreparedAgent | None
) -> int:
    if not processes_for_torchrun(resolved.config.launch):
        return run_here(resolved, stop)
    try:
        return run_by_torchrun(resolved, overrides, config_dir, stop, agent)
    except ConfigError as error:
        return refuse(error)


def run_by_torchrun(
    resolved: ResolvedRun,
    overrides: Sequence[str],
    config_dir: str | None,
    stop: StopRequest,
    agent: PreparedAgent | None = None,
) -> int:
    """Start torchrun for a run, and wait. Return its exit code; `stop` tells whether it was asked to stop.

    agent: an agent started earlier

    Raises ConfigError for a number of machines on which the run has no layout; the others have been told then.
    """
    launch = resolved.config.launch
    if agent is None:
        _say_starting(resolved.config)
    words = [*without_output_dir(overrides), f"output_dir={quoted(str(resolved.config.output_dir))}"]
    arguments = [*([f"--config-dir={config_dir}"] if config_dir else []), *words]
    max_restarts = restarts(launch, resolved.world_size)
    if launch.most_nodes > 1:
        try:
            placements = place(resolved, words, config_dir, RESOLVING)
        except ConfigError as error:
            tell_other_machines(error, resolved.config)
            raise
        for notice in placements.notices:
            print(notice, file=sys.stderr)
        rules = Rules(run_processes(launch), launch.most_nodes, placements.words, max_restarts, launch.join_seconds)
        part = Part(str(Path(resolved.config.output_dir).absolute()), rules, arguments, launch.address)
        started = TorchRun([part.as_word()], rules.processes)
    else:
        processes = [f"--nproc-per-node={resolved.world_size}", f"--max-restarts={max_restarts}"]
        started = TorchRun(["--standalone", *processes, "-m", RANK, *arguments])
    code = started.run(agent)
    stop.obeyed, stop.number = started.stop_requested, started.number
    return code


def _leave() -> None:
    """End this process now, for a second Ctrl-C.

    Nothing is cleaned up: a save under way may take minutes, files on disk are complete at any moment, and the end of the
    interpreter would abort threads that are still copying.
    """
    with contextlib.suppress(Exception):  # the signal may have interrupted a print
        sys.stdout.flush()
    show_cursor()
    with contextlib.suppress(OSError):
        os.write(2, b"meshloom train: interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
