"""The writer process: `python -m meshloom.checkpoint.writing.writer_main <descriptor of its socket> <pid of its trainer>`.

It imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import sys
from typing import Any

from ..faults import install_from_environment
from .handover import Taker
from .watermark import Watermark
from .writer import SWITCH_SECONDS, answer_of, write_anywhere


def serve(link: socket.socket, parent: int) -> None:
    """Answer requests until the trainer, whose process id is `parent`, is gone."""
    taker = Taker(link)
    while True:
        while not select.select([link], [], [], 1.0)[0]:
            if os.getppid() != parent:  # a child of the trainer may still hold its end of the socket
                return
        request = taker.receive()
        link.sendall(_answer(request, taker.memory(request), parent))


def _answer(request: dict[str, Any], memory: memoryview, parent: int) -> bytes:
    try:
        ready = functools.partial(Watermark(memory).wait, alive=lambda: os.getppid() == parent)
        image = memory[: request["size"]]
        return answer_of(write_anywhere(image, request["folder"], request["name"], request["leaves"], ready))
    except Exception as error:  # the trainer decides what a failure means
        return json.dumps({"error": f"writing {request['name']}: {type(error).__name__}: {error}"}).encode() + b"\n"


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
