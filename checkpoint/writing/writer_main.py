"""The writer process: `python -m meshloom.checkpoint.writing.writer_main <descriptor of its socket> <pid of its trainer>`.

It imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from ..faults import install_from_environment
from .handover import Taker
from .image import Ready, Written, write_image, write_segment
from .remote_write import write_image_remote
from .watermark import Watermark

# While a save is hashed the thread that feeds the disk must not wait for the interpreter: a write takes 2 ms or so.
SWITCH_SECONDS = 0.0002


def serve(link: socket.socket, parent: int) -> None:
    """Answer requests until the trainer, whose process id is `parent`, is gone."""
    taker = Taker(link)
    arrivals = select.poll()  # not select(), which knows no descriptor beyond 1023: the socket has the trainer's number for it
    arrivals.register(link, select.POLLIN)
    while True:
        while not arrivals.poll(1000):
            if os.getppid() != parent:  # a child of the trainer may still hold its end of the socket
                return
        request = taker.receive()
        link.sendall(_answer(request, taker.memory(request), parent))


def _answer(request: dict[str, Any], memory: memoryview, parent: int) -> bytes:
    try:
        ready = functools.partial(Watermark(memory).wait, alive=lambda: os.getppid() == parent)
        image = memory[: request["size"]]
        written = _write(image, request, ready)
        return json.dumps(dataclasses.asdict(written)).encode() + b"\n"
    except Exception as error:  # the trainer decides what a failure means
        return json.dumps({"error": f"writing {request['name']}: {type(error).__name__}: {error}"}).encode() + b"\n"


def _write(image: memoryview, request: dict[str, Any], ready: Ready) -> Written:
    """To a local folder or an fsspec URL."""
    folder, name, leaves, start = (request[key] for key in ("folder", "name", "leaves", "start"))
    if "://" in folder:
        return write_image_remote(image, folder, name, leaves, ready)
    if start is not None:
        return write_segment(image, Path(folder) / name, start, ready)
    return write_image(image, Path(folder) / name, Path(folder) / leaves, ready)


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the trainer's final save still needs this process
    install_from_environment()
    sys.setswitchinterval(SWITCH_SECONDS)
    with contextlib.suppress(OSError):  # the trainer is gone, and with it the use of this process
        serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))


if __name__ == "__main__":
    main()
