"""The environment of test programs that run in processes of their own."""

from __future__ import annotations

import os
from pathlib import Path


def with_tests_on_path() -> dict[str, str]:
    """Copy this process's environment, with the tests' folder where Python looks for `support`."""
    tests = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))}
