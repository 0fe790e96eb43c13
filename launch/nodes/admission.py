"""Admission of machines that ask a leader: those of its run, of its version, with its config, which other hosts can reach."""

from __future__ import annotations

from ... import __version__
from .addresses import is_loopback
from .part import Part, difference
from .terms import Term
from .wire import Message


def credentials(term: Term) -> Message:
    """Return what a machine says of itself to the leader of a term with each request."""
    return {"version": __version__, "run": term.run, "term": term.number}


def is_stranger(message: Message, term: Term) -> bool:
    """Return whether a machine asks for another leader, at whose address this one listens by now."""
    return "run" in message and (message["run"], message["term"]) != (term.run, term.number)


def refusal(message: Message, part: Part, term: Term) -> str:
    """Return why a machine can't take part in the run that this machine leads, in a sentence; "" if it can."""
    host, version = message.get("host", "a machine"), message.get("version", "of an older version")
    if version != __version__:
        return f"{host} can't take part: it has Meshloom {version}, and the run {__version__}"
    if host != term.machine:
        for name, address in ((host, message["address"]), (term.machine, term.host)):
            if is_loopback(address):
                return f"{host} can't take part: {unreachable(name, address)}"
    told = difference(message["common"], part.common) if message["common"] is not None else ""
    return f"{host} can't take part: it has {told}" if told else ""


def unreachable(machine: str, address: str) -> str:
    """Return what is wrong with a machine whose address is that of each machine itself."""
    return f"no other host reaches {machine} at {address}: give launch.address there, an address or an interface's name"
