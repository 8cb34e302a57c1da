"""Maps that are made and not sent yet: tried again, after longer and longer pauses."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from qsm_deploy.runtime.serve.dicom.privacy import place_of
from qsm_deploy.runtime.serve.dicom.spool import Round, Spool

FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 600.0


class Outbox:
    """Sends maps, and removes those that were taken.

    Parameters
    ----------
    spool
        Where they lie.
    send
        Sends files, and returns why they were not all taken, if they were not.
    log
        Takes a line about each.
    left
        Maps of a server before.
    first_pause_s
        Before the second try [s]; each after that waits twice as long, up to ten minutes.
    """

    def __init__(
        self,
        spool: Spool,
        send: Callable[[Sequence[Path]], str | None],
        log: Callable[[str], object],
        left: Sequence[Round] = (),
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._spool, self._send, self._log = spool, send, log
        self._first_pause_s = self._pause_s = first_pause_s
        self._unsent, self._fresh, self._stopping = [*left], bool(left), False
        self._changed = threading.Condition()

    def add(self, study: Round) -> None:
        """Send a map, at once."""
        with self._changed:
            self._unsent.insert(0, study)
            self._fresh = True
            self._changed.notify_all()

    def run(self) -> None:
        """Send until :meth:`stop`, and what is fresh then."""
        while self._wait():
            while self._unsent and self._try(self._unsent[0]):
                pass

    def stop(self) -> None:
        """Try once what was not tried yet; the rest stays where it is."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _wait(self) -> bool:
        """Return whether there is something to try, once there is."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._fresh or self._stopping, self._pause_s if self._unsent else None
            )
            fresh, self._fresh = self._fresh, False
            return fresh or not self._stopping

    def _try(self, study: Round) -> bool:
        """Send a map and return whether it was taken; one that was not makes way for others."""
        files: list[Path] = []
        try:
            files = sorted(study.map.iterdir())
            reason = self._send(files)
        except Exception as error:  # one map's fault is not that of the others
            reason = place_of(error)
        with self._changed:
            self._unsent.remove(study)
            if reason is not None:
                self._unsent.append(study)
        if reason is None:
            self._pause_s = self._first_pause_s
            self._forget(study, len(files))
            return True
        self._log(
            f"study {study.number}: not sent, {reason}; {len(self._unsent)} wait, next try in "
            f"{self._pause_s:g} s"
        )
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return False

    def _forget(self, study: Round, count: int) -> None:
        """Remove a map that was taken."""
        try:
            self._spool.remove(study.folder)
            kept = "nothing of it is kept"
        except OSError as error:
            kept = f"{study.folder.name} is not removed ({error.strerror}); remove it by hand"
        self._log(f"study {study.number}: sent, {count} images; {kept}")
