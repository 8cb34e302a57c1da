"""Which study an image belongs to, and when all of it is there: when nothing came for a while."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from qsm_deploy.runtime.serve.dicom.spool import Round, Spool


@dataclass(eq=False)
class _Arriving:
    """A round that images still come for."""

    round: Round
    quiet_since: float
    writing: int = 0


class Studies:
    """The rounds that images come for, each settled once it was quiet for long enough.

    Those that a server before left wait as long, since their images may still be coming.

    Parameters
    ----------
    spool
        Where the images lie.
    settle_s
        How long it must be quiet [s].
    left
        Rounds of a server before.
    """

    def __init__(self, spool: Spool, settle_s: float, left: Sequence[Round] = ()) -> None:
        self._spool, self._settle_s, self._stopping = spool, settle_s, False
        self._changed = threading.Condition()  # its lock lets a signal's handler in
        self._arriving = [_Arriving(one, time.monotonic()) for one in left]

    def take(self, study: str, name: str, *pieces: bytes | memoryview) -> Round | None:
        """Keep an image, and return the round if it is its first.

        Images that come for a study being reconstructed, or after it, are a new round.

        Parameters
        ----------
        study
            What stands for the study in names.
        name
            Of the file.
        pieces
            What it holds.

        Raises
        ------
        MemoryLimitError, OSError
            As :meth:`Spool.write`.
        """
        with self._changed:
            found = [one for one in self._arriving if one.round.study == study]
            if not found:
                found = [_Arriving(self._spool.new_round(study), time.monotonic())]
                self._arriving += found
                first = found[0].round
            else:
                first = None
            found[-1].writing += 1
        try:
            self._spool.write(found[-1].round.images / name, *pieces)
        finally:
            with self._changed:
                found[-1].writing -= 1
                found[-1].quiet_since = time.monotonic()
                self._changed.notify_all()
        return first

    def settled(self) -> Round | None:
        """Wait for the next round that is settled; there is none once the server stops."""
        with self._changed:
            while not self._stopping:
                still = [one for one in self._arriving if not one.writing]
                longest = min(still, key=lambda one: one.quiet_since, default=None)
                left_s = None
                if longest is not None:
                    left_s = longest.quiet_since + self._settle_s - time.monotonic()
                    if left_s <= 0:
                        self._arriving.remove(longest)
                        return longest.round
                self._changed.wait(left_s)
        return None

    def stop(self) -> None:
        """Settle no more."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
