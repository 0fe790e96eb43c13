"""The part of a watched rank: a heartbeat, its stack on a signal, the reason when it fails."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import time
import traceback
from pathlib import Path

from ...config.per_host import is_first_on_host
from ...parallel.heartbeat import Heartbeat
from ...parallel.mesh import Mesh
from ..all_ranks import PeerFailed
from ..launching import visible_gpus
from ..schema import RunConfig
from .folder import WATCH_FOLDER, WATCH_PORT, AttemptFolder, read_json, write_json
from .process import PR_SET_PTRACER, PR_SET_PTRACER_ANY, control_process

STACK_SIGNAL = signal.SIGUSR2
"""A rank that gets it writes the Python stacks of its threads into its file."""
RANKS = "ranks.json"
"""File in a run's folder: rank → host, pid and device of the newest attempt."""
ADDRESS = "watch/address"
PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL", "gloo/")
"""Parts of the messages with which a collective fails when another rank is gone."""

PORT_IS_TAKEN = "ddress already in use"
"""Part of the message of a rank that can't listen, because another process does."""


def join_watch(config: RunConfig) -> Heartbeat:
    """Begin to be watched, where a launcher watches. Return this rank's heartbeat."""
    folder = AttemptFolder.mine()
    if folder is None:
        return Heartbeat()
    rank = int(os.environ["RANK"])
    folder.path.mkdir(parents=True, exist_ok=True)
    # The file must stay open as long as the process lives: faulthandler keeps only its number.
    faulthandler.register(STACK_SIGNAL, folder.stack(rank).open("w"), all_threads=True, chain=False)
    control_process(PR_SET_PTRACER, PR_SET_PTRACER_ANY)  # else py-spy, which is no ancestor, may be refused
    if is_first_on_host():
        about = {
            "output_dir": str(Path(config.output_dir).absolute()),
            "silence": config.launch.silence,
            "timeout": config.parallel.timeout,
            "save_timeout": config.checkpoint.timeout,
            "launch": os.environ.get("TORCHELASTIC_RUN_ID", ""),
            "world_size": int(os.environ["WORLD_SIZE"]),
            "local_world_size": int(os.environ["LOCAL_WORLD_SIZE"]),
            "node": int(os.environ.get("GROUP_RANK", "0")),
            "recorder": os.environ[WATCH_FOLDER] if visible_gpus() else None,
            "nodes": int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        }
        write_json(folder.run, about)
    return Heartbeat(folder.beat(rank))


def introduce(mesh: Mesh, output_dir: Path) -> None:
    """Write `ranks.json`, and tell the launchers of all hosts where their news are gathered. Every rank calls it."""
    store = mesh.store("watch")
    here = f"{socket.gethostname()} {os.getpid()} {mesh.device}"
    store.set(f"rank-{mesh.rank}", here)
    folder = AttemptFolder.mine()
    if mesh.is_main:
        port = os.environ.get(WATCH_PORT, "")
        store.set(ADDRESS, f"{os.environ.get('MASTER_ADDR', 'localhost')}:{port}" if port else "none")
        rows: list[dict[str, object]] = []
        for rank in range(mesh.layout.world_size):
            host, pid, device = store.get(f"rank-{rank}").decode().split(" ")
            rows.append({"rank": rank, "host": host, "pid": int(pid), "device": device})
        with contextlib.suppress(OSError):  # the run's own files tell of a folder that can't be written to
            write_json(output_dir / RANKS, rows)
    if folder is not None and is_first_on_host() and mesh.layout.world_size > 1:
        address = store.get(ADDRESS).decode()
        write_json(folder.run, {**(read_json(folder.run) or {}), "address": None if address == "none" else address})


def find_rank(output_dir: Path, rank: int) -> tuple[str | None, int | None]:
    """Return the host and pid of a rank of the newest attempt, by `ranks.json`; None where it does not say."""
    rows = read_json(output_dir / RANKS)
    row = next((each for each in rows if each["rank"] == rank), None) if isinstance(rows, list) else None
    return (None, None) if row is None else (row["host"], row["pid"])


def write_failure(error: BaseException) -> bool:
    """Leave the reason of this rank's failure to its launcher. Return whether there is one that will tell it."""
    folder = AttemptFolder.mine()
    if folder is None or not folder.path.is_dir():
        return False
    reason = {
        "time": time.monotonic(),
        "error": "".join(traceback.format_exception_only(error)).strip(),
        "traceback": "".join(traceback.format_exception(error)),
        "peer": is_peers_fault(error),
    }
    try:
        write_json(folder.failure(int(os.environ["RANK"])), reason)
    except OSError:
        return False
    return True


def is_peers_fault(error: BaseException) -> bool:
    """Return whether an error says that another rank is gone, and not what was wrong with it."""
    from torch.distributed import DistError

    if PORT_IS_TAKEN in str(error):
        return False
    if isinstance(error, DistError | PeerFailed):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in PEER_IS_GONE)
