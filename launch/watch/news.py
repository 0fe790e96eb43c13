"""News of hosts for the one that judges: values under names, in the memory of its launcher."""

from __future__ import annotations

import threading

from ..nodes.wire import Link, Message, Server


class NewsStore:
    """Keeps the newest value under each name. port: where others reach it."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()
        self._server = Server(self._answer, lambda _: None)
        self.port = self._server.port

    def get(self, name: str) -> str | None:
        """Return a value; None if there is none."""
        with self._lock:
            return self._values.get(name)

    def set(self, name: str, value: str) -> None:
        """Keep a value."""
        with self._lock:
            self._values[name] = value

    def close(self) -> None:
        """Listen no more."""
        self._server.close()

    def _answer(self, message: Message) -> Message:
        if "value" in message:
            self.set(message["name"], message["value"])
        return {"value": self.get(message["name"])}


class NewsLink:
    """Another host's way to a `NewsStore`. Every method raises OSError once its host is lost."""

    def __init__(self, host: str, port: int) -> None:
        self._link = Link(host, port)

    def get(self, name: str) -> str | None:
        """Return a value; None if there is none."""
        return self._link.ask({"id": "news", "name": name}, "value")["value"]

    def set(self, name: str, value: str) -> None:
        """Keep a value."""
        self._link.ask({"id": "news", "name": name, "value": value}, "value")

    def close(self) -> None:
        """Close the connection."""
        self._link.close()
