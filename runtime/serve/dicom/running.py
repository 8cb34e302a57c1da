"""From a model and what the command line says to a running DICOM server, and to its end."""

import ipaddress
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Iterator

from qsm_deploy.runtime.console.user_cache import state_folder
from qsm_deploy.runtime.serve.dicom.entities import Entity, Peer
from qsm_deploy.runtime.serve.limits import Limits

SETTLE_S, QUOTA = 30.0, 20 << 30


@dataclass(frozen=True)
class DicomOptions:
    """What the command line says.

    Attributes
    ----------
    own, to
        The server, and who takes the maps.
    peers
        Who may send; all if there are none.
    settle_s
        How long a study must be quiet until it is begun [s].
    spool, quota
        Where images and maps lie, and most bytes there; without one a folder of the user's.
    certificate, key, authority
        PEM files for TLS, if connections are to be encrypted.
    """

    own: Entity
    to: Entity
    peers: Sequence[Peer] = ()
    settle_s: float = SETTLE_S
    spool: Path | None = None
    quota: int = QUOTA
    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None
