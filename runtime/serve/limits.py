"""What a client of the server may ask for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

PORT = 9002  # where hosts expect a server


def half_of_available() -> int:
    """Return half of the memory that is free [bytes]; the other half is for reconstructions."""
    from qsm_deploy.runtime.reconstruction.memory import available_bytes

    return available_bytes() // 2


@dataclass(frozen=True)
class Limits:
    """Bounds on one session, and on all of them.

    Attributes
    ----------
    message_bytes
        Largest message, besides the id.
    text_bytes
        Largest text: header, configuration, log line or attributes of an image.
    matrix
        Most voxels along one axis of an image.
    images
        Most images in a session.
    session_bytes
        Most bytes of images and texts in a session, as Python holds them.
    all_sessions_bytes
        The same of all sessions together.
    session_seconds
        Longest time to send a session to the server, and again to take its answer.
    idle_seconds
        Longest silence of a client that has something to send or to take; and the longest time
        to take its images for one whose session the server ends.
    yield_seconds
        Silence after which a client makes room for another, once all places are taken.
    linger_seconds
        Silence after which a client is taken to have stopped sending, once the session failed.
    clients
        Most connections at a time; further ones are told to come back.
    allowed
        Whose connections are taken; all if there are none.
    """

    message_bytes: int = 1 << 29
    text_bytes: int = 4 << 20
    matrix: int = 1024
    images: int = 20_000
    session_bytes: int = 2 << 30
    all_sessions_bytes: int = field(default_factory=half_of_available)
    session_seconds: float = 1800.0
    idle_seconds: float = 60.0
    yield_seconds: float = 10.0
    linger_seconds: float = 2.0
    clients: int = 8
    allowed: Sequence[IPv4Network | IPv6Network] = ()

    @property
    def clients_of_one(self) -> int:
        """Most connections of one address: half, so that one machine shuts out no other."""
        return -(-self.clients // 2)

    def allows(self, address: IPv4Address | IPv6Address) -> bool:
        """Return whether connections of an address are taken."""
        return not self.allowed or any(address in network for network in self.allowed)
