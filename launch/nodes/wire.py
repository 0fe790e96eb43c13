"""Requests and answers between launchers: a JSON object a line, over one TCP connection."""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, cast

ANSWER_SECONDS = 10.0
"""A leader that has not answered for so long is lost. The same holds for a machine that has not asked."""
LONGEST = 2**22
"""Bytes of a line; a machine's report carries a traceback."""

Message = dict[str, Any]


class Link:
    """A connection to a `Server`. Every method raises OSError once its process is lost."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), ANSWER_SECONDS)
        self._lines = self._socket.makefile("rb")

    def ask(self, message: Message, key: str) -> Message:
        """Send a request, and return the answer. key: what every answer has; one without it is another program's."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        line = self._lines.readline(LONGEST)
        if not line.endswith(b"\n"):
            raise ConnectionResetError("the connection is closed")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or key not in answer:
            raise ConnectionResetError("another program listens on the port")
        return cast(Message, answer)

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self._lines.close()
            self._socket.close()


class Server:
    """Listens on a port of its own, and answers requests until it is closed.

    address  its port on all of this machine's addresses
    """

    def __init__(self, answer: Callable[[Message], Message], lost: Callable[[str], None]) -> None:
        """answer: to a request; lost: called with a machine's id when its connection has ended."""

        class Handler(socketserver.StreamRequestHandler):
            timeout = 4 * ANSWER_SECONDS

            def handle(self) -> None:
                server.connections.add(self.connection)
                asked = ""
                try:
                    while (message := self._request()) is not None:
                        asked = str(message["id"])
                        self.wfile.write(json.dumps(answer(message)).encode() + b"\n")
                except OSError:
                    pass  # a machine that is lost
                finally:
                    server.connections.discard(self.connection)
                    if asked:
                        lost(asked)

            def _request(self) -> Message | None:
                """Read a request; None at the end, or of a program that is no machine of a run."""
                line = self.rfile.readline(LONGEST)
                try:
                    message = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    return None
                return message if isinstance(message, dict) and "id" in message else None  # pyright: ignore[reportUnknownVariableType]

        class Threads(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 1024

            def handle_error(self, request: object, client_address: object) -> None:
                """Print a fault of this side once, however often machines ask again."""
                text = traceback.format_exc()
                if text not in server.faults:
                    server.faults.add(text)
                    print(text, file=sys.stderr, flush=True)

        server = self
        self.connections: set[socket.socket] = set()
        self.faults: set[str] = set()
        self._server = Threads(("", 0), Handler)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True, name="leader").start()

    def close(self) -> None:
        """Stop to listen, and close all connections."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
