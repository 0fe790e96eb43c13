"""`meshloom slurm`: print a complete sbatch script for a run, or for every run of a sweep.

The template is `slurm.sbatch` beside this file; what the script asks of the cluster is in `sbatch_directives.py`.
"""

from __future__ import annotations

import argparse
import shlex
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.overrides import normalize_override, quoted
from ..config.problems import ConfigError, Problem
from ..config.sweeps import job_folder, without_output_dir
from ..trainer.launching import ContainerConfig
from ..trainer.resolve import ResolveOptions, resolve
from ..trainer.schema import RunConfig, make_composer
from .exit_codes import BAD_CONFIG
from .nodes.part import overlaid
from .nodes.placement import place
from .sbatch_directives import directive_problems, directives

TEMPLATE = Path(__file__).with_name("slurm.sbatch")

RESOLVING = ResolveOptions(
    lambda config: config.launch.most_nodes * config.launch.gpus_per_node,
    resumes=False,
    more=lambda config: list(directive_problems(config.launch)),
)


def main(argv: Sequence[str]) -> int:
    """Print the script for a command line of `meshloom train`. Return 0, or 2 for a config that can't run."""
    parser = argparse.ArgumentParser(
        prog="meshloom slurm",
        description="Print a complete sbatch script for the run that these overrides describe; launch.* sets the resources.",
        epilog="examples: meshloom slurm recipe=llama_1b launch.nodes=4 > run.sbatch;"
        " meshloom slurm -m recipe=llama_1b optim.lr=3e-4,1e-3 launch.nodes=1 > sweep.sbatch",
    )
    parser.add_argument("--config-dir", help="folder of further recipes, as for meshloom train")
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep: a job array with a run for each combination")
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_intermixed_args(argv)
    write = sweep_script if arguments.multirun else script
    try:
        print(write(arguments.overrides, arguments.config_dir), end="")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    return 0


def script(overrides: Sequence[str], config_dir: str | None = None) -> str:
    """Return the sbatch script of a run. Raises ConfigError with every problem of its config on launch.nodes full nodes.

    Of a range of nodes, every number has to have a layout, too.
    """
    overrides = [normalize_override(word) for word in overrides]
    resolved = resolve(overrides, RESOLVING, config_dir)
    resolved.refuse()
    if resolved.config.launch.least_nodes < resolved.config.launch.most_nodes:
        node = f"launch.nproc={resolved.config.launch.gpus_per_node}"
        words = overlaid(overrides, [node])
        place(resolve(words, RESOLVING, config_dir), words, config_dir, RESOLVING)
    # A job that is queued again goes on with its run by itself (`trainer/restarts.py`).
    return fill(TEMPLATE.read_text(), resolved.config, Runs(_words(overrides, config_dir), automatic=list(resolved.fitted)))


def sweep_script(overrides: Sequence[str], config_dir: str | None = None) -> str:
    """Return the sbatch script of a sweep: an array of jobs, each of which trains one combination in a folder of its own.

    The folders are those of `meshloom train -m`. Raises ConfigError with the problems of all runs, or if their `launch` differ.
    """
    if used := [word for word in overrides if word.startswith("hydra")]:
        raise ConfigError([Problem(used[0], "the array is SLURM's, not Hydra's", "leave it out")])
    overrides = [normalize_override(word) for word in overrides]
    jobs = make_composer(config_dir).expand(overrides)
    problems: list[Problem] = []
    configs: list[RunConfig] = []
    automatic: list[str] = []
    for job in jobs:
        resolved = resolve(job, RESOLVING, config_dir)
        problems += [problem for problem in resolved.problems if problem not in problems]
        configs.append(resolved.config)
        automatic = list(dict.fromkeys([*automatic, *resolved.fitted]))
    if not problems and any(config.launch != configs[0].launch for config in configs):
        problems.append(Problem("launch", "the jobs of an array are alike", "write one script for each value of launch.*"))
    if problems:
        raise ConfigError(problems)
    folders = [job_folder(config.output_dir, overrides, job) for job, config in zip(jobs, configs, strict=True)]
    lines = [
        f"    {number}) RUN=({_words([*without_output_dir(job), f'output_dir={quoted(folder)}'], config_dir)}) ;;"
        for number, (job, folder) in enumerate(zip(jobs, folders, strict=True))
    ]
    choice = "\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *lines, "esac"])
    parents = list(dict.fromkeys(str(Path(folder).parent) for folder in folders))
    return fill(TEMPLATE.read_text(), configs[0], Runs('"${RUN[@]}"', choice, len(jobs), parents, automatic))


@dataclass(frozen=True)
class Runs:
    """The runs that the script trains.

    words    arguments of the run, as the node's shell gets them
    choice   lines that set RUN, the arguments of this job of an array; "": the script is no array
    count    jobs of the array
    folders  folders that hold the runs of the sweep
    automatic  keys that every start of a job decides for the GPUs that it is given
    """

    words: str
    choice: str = ""
    count: int = 0
    folders: Sequence[str] = ()
    automatic: Sequence[str] = ()


def fill(template: str, config: RunConfig, runs: Runs) -> str:
    """Fill the template with the run's values."""
    launch = config.launch
    container, srun_args = _container_words(launch.container), [shlex.quote(str(word)) for word in launch.srun_args]
    return string.Template(template).substitute(
        directives="".join(f"#SBATCH {directive}\n" for directive in directives(launch, runs.count)),
        setup=_section("What the site needs", [str(line) for line in launch.setup]),
        choice=_section("Which run of the sweep this job trains", runs.choice.splitlines()),
        gpus=launch.gpus_per_node,
        automatic=f"# On the job's GPUs it finds {' and '.join(runs.automatic)}, which are auto.\n" if runs.automatic else "",
        python=shlex.quote(sys.executable if launch.container.image is None else launch.container.python),
        srun_words=" ".join([*srun_args, *container, ""]),
        command_line=runs.words,
        results="".join(_results_lines(runs.folders, srun_args, container)),
    )


def _section(title: str, lines: Sequence[str]) -> str:
    """Return lines of the script under a heading; "" for none."""
    return "\n".join([f"# ---- {title} ".ljust(120, "-"), *lines, "", ""]) if lines else ""


def _container_words(container: ContainerConfig) -> list[str]:
    """Return the words between srun and the command that it starts, for a shell. The working folder is the same inside."""
    if container.image is None:
        return []
    mounts = ",".join(["$PWD:$PWD", *(str(mount) for mount in container.mounts)])
    image = shlex.quote(container.image)
    if container.runtime == "pyxis":
        return [f"--container-image={image}", f'--container-mounts="{mounts}"', '--container-workdir="$PWD"']
    return ["apptainer", "exec", "--nv", "--bind", f'"{mounts}"', "--pwd", '"$PWD"', image]


def _results_lines(folders: Sequence[str], srun_args: Sequence[str], container: Sequence[str]) -> list[str]:
    """Return the command that tells how far the runs of a sweep have come, for the end of each of its jobs.

    In a container it needs a step of its own, on one node whatever `srun_args` say.
    """
    inside = ["srun", *srun_args, "--nodes=1", "--ntasks=1", *container] if container else []
    return [" ".join([*inside, '"$PYTHON"', "-m", "meshloom.launch.sweep_results", shlex.quote(one)]) + "\n" for one in folders]


def _words(overrides: Sequence[str], config_dir: str | None) -> str:
    """Return the arguments of `meshloom train`, quoted for a shell."""
    folder = [f"--config-dir={Path(config_dir).resolve()}"] if config_dir else []
    return " ".join(shlex.quote(word) for word in [*folder, *overrides])
