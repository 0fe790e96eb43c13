"""Serve a report on this machine alone, made anew as its runs go on."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import urlsplit

HOST = "127.0.0.1"
REFRESH_SECONDS = 5.0
NAMES = ("localhost", HOST)


class LivePage:
    """A page that is made again when a file of its runs has changed."""

    def __init__(self, make: Callable[[], str], files: Callable[[], list[Path]]) -> None:
        self._make, self._files = make, files
        self._lock = Lock()
        self._state: list[tuple[str, float, int]] | None = None
        self._html = ""

    def html(self) -> str:
        """Return the page of now."""
        with self._lock:
            state = [(str(path), stat.st_mtime, stat.st_size) for path in self._files() if (stat := _stat(path)) is not None]
            if state != self._state:
                self._html, self._state = self._make(), state
            return self._html


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def make_server(page: LivePage, port: int) -> ThreadingHTTPServer:
    """Bind a server to a port of the loopback interface; 0: any free one. Raises OSError where the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer with the page; another path does not exist."""
            # A web site could have its own name resolve to this machine, to read the page through the browser.
            if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in NAMES:
                self.send_error(403, "open it as http://localhost")
            elif urlsplit(self.path).path != "/":
                self.send_error(404)
            else:
                self._answer()

        def _answer(self) -> None:
            try:
                body = page.html().encode()
            except Exception as error:  # a run's folder may be moved aside at any moment: say so, and go on serving
                self.send_error(503, explain=f"{type(error).__name__}: {error}")
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing for each request."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET
        daemon_threads = True

    return Server((HOST, port), Handler)


def serve(page: LivePage, port: int) -> None:
    """Serve until Ctrl-C."""
    with make_server(page, port) as server:
        print(f"serving on http://{HOST}:{server.server_address[1]}/ until Ctrl-C", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
