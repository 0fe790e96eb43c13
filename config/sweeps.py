"""Folders of a sweep's jobs: the same for a job that runs here, through Hydra's launchers or as a task of a SLURM array."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from xxhash import xxh3_64_hexdigest

LONGEST_NAME = 200  # file systems take 255


def job_folder(output_dir: str, overrides: Sequence[str], job: Sequence[str]) -> str:
    """Return the folder of a job. output_dir: of the whole sweep, as the job's config has it."""
    return f"{output_dir}/sweep/{sweep_folder(overrides, job)}"


def sweep_folder(overrides: Sequence[str], job: Sequence[str]) -> str:
    """Return the name of a sweep job's folder: the job's overrides of the keys that the sweep varies.

    It stays the same if the sweep is extended later, so that its jobs can be resumed.
    """
    parser = OverridesParser.create()
    swept = {override.get_key_element() for override in parser.parse_overrides(list(overrides)) if override.is_sweep_override()}
    lines = [override for override in parser.parse_overrides(list(job)) if override.get_key_element() in swept]
    name = "_".join(f"{line.get_key_element()}={line.get_value_element_as_str()}" for line in lines) or "job"
    plain = re.sub(r"[^A-Za-z0-9.,=+_\[\]-]+", "-", name)[:LONGEST_NAME]
    return plain if plain == name else f"{plain}_{xxh3_64_hexdigest(name.encode())}"  # two names must not become one


def without_output_dir(overrides: Sequence[str]) -> list[str]:
    """Return a command line without its folder, to which the folder of one run is added."""
    return [word for word in overrides if not word.startswith("output_dir=")]
