"""The writer process: `python -m meshloom.checkpoint.writing.writer_main <descriptor of its socket> <pid of its trainer>`.

It imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import os
import select
import signal
import socket
import sys

from ..faults import install_from_environment
from .watermark import Watermark
from .writer import SWITCH_SECONDS, answer_of, write_anywhere


def serve(link: socket.socket, parent: int) -> None:
    """Answer requests until the trainer, whose process id is `parent`, is gone."""
    known: dict[int, mmap.mmap] = {}
    while True:
        while not select.select([link], [], [], 1.0)[0]:
            if os.getppid() != parent:  # a child of the trainer may still hold its end of the socket
                return
        line, descriptors, _, _ = socket.recv_fds(link, 65536, 1)
        if not line:
            return
        while not line.endswith(b"\n"):
            more = link.recv(65536)
            if not more:
                return
            line += more
        request = json.loads(line)
        try:
            if descriptors:
                known[request["memory"]] = mmap.mmap(descriptors[0], request["length"])
                os.close(descriptors[0])
            whole = memoryview(known[request["memory"]])
            ready = functools.partial(Watermark(whole).wait, alive=lambda: os.getppid() == parent)
            image = whole[: request["size"]]
            reply = answer_of(write_anywhere(image, request["folder"], request["name"], request["leaves"], ready))
        except Exception as error:  # the trainer decides what a failure means
            reply = json.dumps({"error": f"writing {request['name']}: {type(error).__name__}: {error}"}).encode() + b"\n"
        link.sendall(reply)


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
