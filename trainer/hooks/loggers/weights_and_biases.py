"""Weights & Biases: the rows of metrics.jsonl on its server, or in its folder while offline."""

from __future__ import annotations

import configparser
import contextlib
import json
import netrc
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from ....config.problems import ConfigError, Problem
from ...loop import Loop
from .base import OptionalLogger
from .config import LoggingConfig

if TYPE_CHECKING:
    import numpy as np

ONLINE = ("online", "run", "shared")
SILENT = ("offline", "dryrun", "disabled")
SERVERS = ("wandb", "coreweave")  # parts of the names of the library's default servers
LONGEST_NAME = 128  # of a run, on the server
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
    elif mode in ONLINE and not _has_key(settings):
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


class WandB(OptionalLogger):
    """Logs to Weights & Biases; WANDB_MODE=offline needs no network. A resumed run continues the same wandb run.

    `logging` counts first, then the library's own variables of the environment (WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME,
    WANDB_RUN_GROUP, WANDB_DIR, WANDB_RUN_ID), then what is given here. Needs the extra meshloom[wandb].
    """

    of_one_run = True
    title = "wandb"

    def __init__(self, logging: LoggingConfig, output_dir: Path, run_config: Mapping[str, Any]) -> None:
        import wandb

        super().__init__(logging.every)
        self._wandb: Any = wandb
        self._logging = logging
        self._output_dir = output_dir
        self._config = dict(run_config)
        self._id: str | None = None
        self._run: Any = None
        self._sent = Sent(output_dir / "wandb-sent.json")

    def on_run_begin(self, loop: Loop) -> None:
        """Start a wandb run, or continue the one that the checkpoint names. Raises ConfigError if it can't begin."""
        self._id = os.environ.get("WANDB_RUN_ID") or self._id or uuid.uuid4().hex[:12]
        try:
            self._run = self._wandb.init(
                id=self._id,
                resume="allow",
                config=self._config,
                settings=self._wandb.Settings(silent=True),
                **self._names(),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # no key, no network, no room, no process of its own
            raise ConfigError([Problem("logging.wandb", f"can't begin: {error}", FIX)]) from error

    def on_run_accepted(self, loop: Loop) -> None:
        """Look up what earlier segments have sent of this wandb run."""
        assert self._id is not None
        self._sent.begin(self._id)

    def _names(self) -> dict[str, Any]:
        """Return what the wandb run is filed under: what `logging` says, then the environment, then what is made here.

        Of these, a job of a sweep is named after what the sweep varies, and grouped with the others.
        """
        name, group = str(self._config["recipe"]), None
        if self._output_dir.parent.name == "sweep":
            group = self._output_dir.parent.parent.name
            name = f"{name} {self._output_dir.name}"[:LONGEST_NAME]
        config = self._logging
        found = {
            "project": (config.project, "WANDB_PROJECT", "meshloom"),
            "entity": (config.entity, "WANDB_ENTITY", None),
            "name": (config.name, "WANDB_NAME", name),
            "group": (config.group, "WANDB_RUN_GROUP", group),
            "dir": (None, "WANDB_DIR", str(self._output_dir)),
        }
        named = {key: first or os.environ.get(variable) or default for key, (first, variable, default) in found.items()}
        return {**{key: value for key, value in named.items() if value is not None}, "tags": config.tags or None}

    def send(self, row: dict[str, Any]) -> None:
        """Send the row, unless it is of a step that was sent already: a run that was set back takes steps again."""
        if self._sent.is_new(row):
            self._run.log(row)
            self._sent.add(row)

    def on_picture(self, loop: Loop, name: str, picture: np.ndarray) -> None:
        """Send a picture."""
        self.attempt(lambda: self._run.log({"step": loop.progress.step, name: self._wandb.Image(picture)}))

    def end(self) -> None:
        """Send what is left and finish the wandb run."""
        run, self._run = self._run, None
        self._sent.close()
        if run is not None:
            run.finish()

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


class Sent:
    """A small file that says up to which step rows of each kind were sent to a wandb run, which can't be asked offline."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._id = ""
        self._before: dict[str, int] = {}
        self._now: dict[str, int] = {}

    def begin(self, run_id: str) -> None:
        """Read what was sent to this wandb run. Raises OSError if the file can't be opened."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._id = run_id
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # cut off by a crash: some rows come twice
            found = json.loads(os.pread(self._file, 4096, 0))
            if found["id"] == run_id:
                self._before = {str(kind): int(step) for kind, step in found["steps"].items()}
        self._now = dict(self._before)

    def is_new(self, row: Mapping[str, Any]) -> bool:
        """Return whether no earlier segment has sent a row of this kind and step."""
        return row["step"] > self._before.get(_kind(row), -1)

    def add(self, row: Mapping[str, Any]) -> None:
        """Note that a row was sent. Raises OSError."""
        self._now[_kind(row)] = max(row["step"], self._now.get(_kind(row), -1))
        if self._file is not None:
            text = json.dumps({"id": self._id, "steps": self._now})
            os.pwrite(self._file, text.ljust(256).encode(), 0)  # always as long, so that nothing older is left behind it

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _kind(row: Mapping[str, Any]) -> str:
    if any(name.startswith("tasks/") for name in row):
        return "tasks"
    return next((name for name in ("eval_loss", "checkpoint_step") if name in row), "loss")
