"""The place where a machine is reached: its address, and a port that nobody takes between its choice and its use."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct

SIOCGIFADDR = 0x8915
"""Request of Linux' `ioctl`: an interface's IPv4 address (netdevice(7))."""


def own_address(wanted: str = "auto") -> str:
    """Return the address under which other machines reach this one. wanted: an address, an interface's name, or auto.

    auto: the address of the default route, or of this machine's name. Raises OSError where an interface has no address.
    """
    if wanted != "auto":
        return _interface_address(wanted) if wanted in {name for _, name in socket.if_nameindex()} else wanted
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))  # sends nothing
        return str(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Return whether an address leads every machine to itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _interface_address(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    return socket.inet_ntoa(found[20:24])


class ReservedPort:
    """A port for another process of this machine to listen on, kept free for it until `close`.

    The socket is bound and does not listen. Linux gives its port to no connection and to nobody who asks for any free port,
    and lets it be listened on by a process that names it with SO_REUSEADDR, as PyTorch's store does (socket(7)).
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("", 0))
        self.number = int(self._socket.getsockname()[1])

    def close(self) -> None:
        """Give it back."""
        self._socket.close()
