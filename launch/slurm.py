"""`meshloom slurm`: print a complete sbatch script for a run. The template is `slurm.sbatch` beside this file."""

from __future__ import annotations

import argparse
import shlex
import string
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config.problems import ConfigError, Problem
from ..trainer.launching import LaunchConfig
from ..trainer.resolve import ResolveOptions, resolve
from ..trainer.schema import RunConfig

TEMPLATE = Path(__file__).with_name("slurm.sbatch")


def main(argv: Sequence[str]) -> int:
    """Print the script for a command line of `meshloom train`. Return 0, or 2 for a config that can't run."""
    parser = argparse.ArgumentParser(
        prog="meshloom slurm",
        description="Print a complete sbatch script for the run that these overrides describe; launch.* sets the resources.",
        epilog="example: meshloom slurm recipe=llama_1b launch.nodes=4 > run.sbatch",
    )
    parser.add_argument("--config-dir", help="folder of further recipes, as for meshloom train")
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_args(argv)
    try:
        print(script(arguments.overrides, arguments.config_dir), end="")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def script(overrides: Sequence[str], config_dir: str | None = None) -> str:
    """Return the sbatch script of a run. Raises ConfigError with every problem of its config on launch.nodes full nodes."""
    options = ResolveOptions(
        lambda config: config.launch.nodes * config.launch.gpus_per_node,
        resumes=False,
        more=lambda config: list(_job_problems(config.launch)),
    )
    resolved = resolve(overrides, options, config_dir)
    resolved.refuse()
    return fill(TEMPLATE.read_text(), resolved.config, _command_line(overrides, config_dir))


def _job_problems(launch: LaunchConfig) -> Iterator[Problem]:
    """Yield the values that sbatch would refuse or misread."""
    for key in ("job_name", "partition", "account"):
        name = getattr(launch, key)
        if name is not None and (not name.strip() or not name.isprintable()):
            yield Problem(f"launch.{key}", f"{name!r} is no name", "write one, in one line")
    if "/" in launch.job_name:
        fix = "leave the slash out: the job's output goes to <job_name>-<number>.out"
        yield Problem("launch.job_name", f"'{launch.job_name}' is no name of a file", fix)
    if launch.cpus_per_task is not None and launch.cpus_per_task < 1:
        fix = "use 1 or more, or null for the cluster's default"
        yield Problem("launch.cpus_per_task", f"{launch.cpus_per_task} is not a number of them", fix)


def fill(template: str, config: RunConfig, command_line: str) -> str:
    """Fill the template with the run's values. Lines of sbatch options that are not set are left out."""
    launch = config.launch
    optional = {"partition": launch.partition, "account": launch.account, "cpus-per-task": launch.cpus_per_task}
    given = {name: shlex.quote(str(value)) for name, value in optional.items() if value is not None}
    return string.Template(template).substitute(
        job_name=shlex.quote(launch.job_name),
        nodes=launch.nodes,
        gpus=launch.gpus_per_node,
        time=launch.time,
        signal_seconds=launch.signal_seconds,
        optional="".join(f"#SBATCH --{name}={value}\n" for name, value in given.items()),
        max_restarts=launch.max_restarts,
        python=shlex.quote(sys.executable),
        command_line=command_line,
    )


def _command_line(overrides: Sequence[str], config_dir: str | None) -> str:
    """Return the job's command line. A job that is queued again goes on with its run by itself (`trainer/restarts.py`)."""
    folder = [f"--config-dir={Path(config_dir).resolve()}"] if config_dir else []
    return " ".join(shlex.quote(word) for word in [*folder, *overrides])
