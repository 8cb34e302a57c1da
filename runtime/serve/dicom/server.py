"""From a study that is there to its map on the way: one at a time, and nothing left behind."""

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from qsm_deploy.kernels.errors import DataError, QsmDeployError
from qsm_deploy.runtime.console.peak_memory import return_freed_memory
from qsm_deploy.runtime.serve.dicom.outbox import Outbox
from qsm_deploy.runtime.serve.dicom.privacy import place_of
from qsm_deploy.runtime.serve.dicom.receiver import Receiver
from qsm_deploy.runtime.serve.dicom.spool import Round, Spool
from qsm_deploy.runtime.serve.dicom.studies import Studies

MOST_TRIES = 2  # of a study during which the server was killed
Reconstruct = Callable[[Path, Path], None]


class DicomServer:
    """Takes studies, makes their maps, and sends these.

    Parameters
    ----------
    receiver, studies, spool, outbox
        What comes in, waits, lies and goes out.
    reconstruct
        Reads the images in one folder, and writes those of the map into another.
    log
        Takes a line about every study.
    """

    def __init__(
        self,
        receiver: Receiver,
        studies: Studies,
        spool: Spool,
        outbox: Outbox,
        reconstruct: Reconstruct,
        log: Callable[[str], object],
    ) -> None:
        self._receiver, self._studies, self._spool = receiver, studies, spool
        self._outbox, self._reconstruct, self._log = outbox, reconstruct, log

    def serve(self) -> None:
        """Work until :meth:`stop`, then finish the map that is being made, and try to send it."""
        sending = threading.Thread(target=self._outbox.run)
        sending.start()
        self._receiver.start()
        try:
            while (study := self._studies.settled()) is not None:
                self._finish(study)
                return_freed_memory()
        finally:
            self.stop()
            self._receiver.join()
            self._outbox.stop()
            sending.join()

    def stop(self) -> None:
        """Take and begin nothing more; what is in the spool stays there for the next server."""
        self._receiver.stop()
        self._studies.stop()

    def _finish(self, study: Round) -> None:
        """Make a study's map, or say why there is none; either way its images are removed."""
        began = time.monotonic()
        try:
            try:
                made = self._made(study)
            except QsmDeployError as error:
                result = f"refused, {error}"
            except MemoryError:
                result = "refused, out of memory"
            except Exception as error:
                result = f"failed, {place_of(error)}"
            else:
                self._log(f"study {study.number}: map made in {time.monotonic() - began:.1f} s")
                self._spool.keep_map(made, study)
                self._outbox.add(study)
                return
            self._log(f"study {study.number}: {result}; nothing is sent, its images are removed")
            self._spool.remove(study.folder)
        except OSError as error:
            self._log(
                f"study {study.number}: what it left in the spool is not removed "
                f"({error.strerror}); remove {study.folder.name} by hand"
            )

    def _made(self, study: Round) -> Path:
        """Return the folder of a finished map."""
        series = study.series
        listed = ", ".join(f"{number} ({count})" for number, count in sorted(series.items()))
        self._log(f"study {study.number}: {series.total()} images of series {listed}; begun")
        if study.begin() > MOST_TRIES:
            raise DataError(f"the server was killed {MOST_TRIES} times while it was at it")
        target = Path(tempfile.mkdtemp(dir=self._spool.work))
        self._reconstruct(study.images, target)
        if not any(target.iterdir()):
            raise DataError("no map was made of it")
        return target
