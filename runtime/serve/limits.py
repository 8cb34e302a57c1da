"""What a client of the server may ask for."""

from dataclasses import dataclass

PORT = 9002  # where hosts expect a server


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
        Most bytes of images in a session.
    session_seconds
        Longest time to send a session to the server, and again to take its answer.
    idle_seconds
        Longest silence of a client that has something to send or to take.
    linger_seconds
        Silence after which a client is taken to have stopped sending, once the session failed.
    clients
        Most connections at a time; further ones are told to come back.
    """

    message_bytes: int = 1 << 29
    text_bytes: int = 4 << 20
    matrix: int = 1024
    images: int = 20_000
    session_bytes: int = 2 << 30
    session_seconds: float = 1800.0
    idle_seconds: float = 60.0
    linger_seconds: float = 2.0
    clients: int = 8
