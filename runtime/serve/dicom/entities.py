"""Who takes part, as the command line writes it: ``AE@HOST:PORT``, and ``AE@ADDRESS``."""

import ipaddress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from qsm_deploy.kernels.errors import UsageError

TITLE_CHARACTERS = 16


@dataclass(frozen=True)
class Entity:
    """An application entity: what it is called, and where it listens."""

    title: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.title}@{host}:{self.port}"


@dataclass(frozen=True)
class Peer:
    """Who may send: a machine or those of a network, under one title or any."""

    network: IPv4Network | IPv6Network
    title: str | None = None

    def __str__(self) -> str:
        return f"{self.title}@{self.network}" if self.title else str(self.network)

    def is_sender(self, title: str, address: IPv4Address | IPv6Address) -> bool:
        """Return whether it is who calls itself so, from there."""
        return address in self.network and self.title in (None, title)


def entity_from(text: str) -> Entity:
    """Return an entity of ``AE@HOST:PORT``; an IPv6 address is in brackets.

    Raises
    ------
    UsageError
        If it is none.
    """
    title, at, where = text.rpartition("@")
    host, colon, port = where.rpartition(":")
    if not (at and colon and host and port.isdecimal() and int(port) <= 65535):
        raise UsageError(f"{text!r} is no AE@HOST:PORT, as in QSM@127.0.0.1:11112")
    bare = host.removeprefix("[").removesuffix("]")
    if (":" in bare) != (host == f"[{bare}]"):
        raise UsageError(f"{text!r}: write an IPv6 address in brackets, as in QSM@[::1]:11112")
    return Entity(_title(title), bare, int(port))


def peer_from(text: str) -> Peer:
    """Return who may send, of ``ADDRESS``, a network, or either after ``AE@``.

    Raises
    ------
    UsageError
        If it is none of these.
    """
    title, at, network = text.rpartition("@")
    try:
        return Peer(ipaddress.ip_network(network), _title(title) if at else None)
    except ValueError as error:
        raise UsageError(f"{error}, as in 10.0.0.5, 10.0.0.0/24 or SCANNER@10.0.0.5") from None


def _title(text: str) -> str:
    title = text.strip()
    shown = title.isascii() and title.isprintable() and "\\" not in title
    if not (title and shown and len(title) <= TITLE_CHARACTERS):
        raise UsageError(
            f"{text!r} is no AE title: 1 to {TITLE_CHARACTERS} ASCII characters, no backslash"
        )
    return title
