"""Weights & Biases: the rows of metrics.jsonl on its server, or in its folder while offline."""

from __future__ import annotations

import configparser
import netrc
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ....config.problems import ConfigError, Problem
from ...loop import Loop
from .base import RowLogger

ONLINE = ("online", "run", "shared")
SILENT = ("offline", "dryrun", "disabled")
SERVERS = ("wandb", "coreweave")  # parts of the names of the library's default servers
FIX = "run `wandb login`, or set WANDB_MODE=offline, or logging.wandb=false"


def wandb_problems() -> Iterator[Problem]:
    """Yield the problems that keep a wandb run from starting, as far as environment and files tell. Uses no network.

    Reads what the library reads (its documentation of environment variables), so that nothing is imported or started. An
    invalid key is found only when the run begins.
    """
    settings = _settings()
    mode = os.environ.get("WANDB_MODE") or settings.get("mode") or "online"
    if mode not in (*ONLINE, *SILENT):
        yield Problem("logging.wandb", f"WANDB_MODE={mode} is no mode", "use online, offline or disabled")
    elif mode in ONLINE and not os.environ.get("WANDB_DISABLED") and not _has_key(settings):
        yield Problem("logging.wandb", "there is no API key of Weights & Biases", FIX)


def _settings() -> dict[str, str]:
    """Read the library's settings files: the user's, overridden by the working folder's (written by `wandb offline`)."""
    found: dict[str, str] = {}
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    workspace = Path(os.environ.get("WANDB_DIR") or ".")
    for path in (folder / "settings", workspace / "wandb" / "settings", workspace / ".wandb" / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path)
        except (configparser.Error, UnicodeDecodeError):
            continue
        if parser.has_section("default"):
            found.update(parser.items("default"))
    return found


def _has_key(settings: dict[str, str]) -> bool:
    named = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if any(os.environ.get(name) for name in named) or settings.get("api_key") or settings.get("identity_token_file"):
        return True
    server = os.environ.get("WANDB_BASE_URL") or settings.get("base_url")
    servers = (urlparse(server).hostname or server,) if server else SERVERS
    given = os.environ.get("NETRC")
    for path in [given] if given else ["~/.netrc", "~/_netrc"]:
        try:
            hosts = netrc.netrc(Path(path).expanduser()).hosts
        except FileNotFoundError:
            continue
        except (OSError, netrc.NetrcParseError):
            return True  # unreadable: assume it has the key
        if any(name in host for name in servers for host in hosts):
            return True
    return False


class WandB(RowLogger):
    """Logs to Weights & Biases; WANDB_MODE=offline needs no network. A resumed run continues the same wandb run.

    Needs the extra meshloom[wandb].
    """

    of_one_run = True

    def __init__(self, project: str, output_dir: Path, run_config: Mapping[str, Any], every: int) -> None:
        import wandb

        super().__init__(every)
        self._wandb: Any = wandb
        self._project = project
        self._output_dir = output_dir
        self._config = dict(run_config)
        self._name = str(run_config["recipe"])
        self._id: str | None = None
        self._run: Any = None

    def on_run_begin(self, loop: Loop) -> None:
        """Start a wandb run, or continue the one that the checkpoint names."""
        self._id = self._id or uuid.uuid4().hex[:12]
        try:
            self._run = self._wandb.init(
                project=self._project,
                id=self._id,
                name=self._name,
                resume="allow",
                dir=str(self._output_dir),
                config=self._config,
                settings=self._wandb.Settings(silent=True),
            )
        except self._wandb.Error as error:  # no key, no network
            raise ConfigError([Problem("logging.wandb", f"can't begin: {error}", FIX)]) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: dict[str, Any]) -> None:
        """Send the row."""
        self._run.log(row)

    def close(self) -> None:
        """Send what is left and finish the wandb run."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def state_dict(self) -> dict[str, Any]:
        """Return the id of the wandb run."""
        return {"id": self._id}

    @property
    def waits_for_rows(self) -> bool:
        """Always false: the id does not depend on the rows."""
        return False

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the id of the wandb run to continue."""
        self._id = state.get("id")
