"""From the images of one study to those of its map, by what was opened once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsm_deploy.kernels.errors import DataError, QsmDeployError, UsageError
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.dicom.frames import read_frames
from qsm_deploy.runtime.dicom.map_series import require_susceptibility
from qsm_deploy.runtime.dicom.output import DicomOut
from qsm_deploy.runtime.dicom.series import series_of
from qsm_deploy.runtime.job.from_dicom import volumes_from
from qsm_deploy.runtime.job.memory_limit import within_process
from qsm_deploy.runtime.job.one_scan import measured_scan, run_scan
from qsm_deploy.runtime.job.request import make_request
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstructor import Host, Maker, Reconstructor, open_reconstructor

ONE = 1  # thread, since a GPU belongs to the one that opened it
SHORT = 3  # characters of what is no name


class _Notes(TerminalLog):
    """What the user must know, into the log of the server."""

    def __init__(self, log: Callable[[str], object]) -> None:
        super().__init__(quiet=True)
        self._write = log

    def warn(self, text: str) -> None:
        self._write(f"note: {text}")


@dataclass(frozen=True)
class MapMaker:
    """Makes maps one after the other, in the thread that opened what makes them.

    Attributes
    ----------
    name
        Method, precision, and what runs it.
    """

    name: str
    _reconstructor: Reconstructor
    _wants: Wants
    _worker: ThreadPoolExecutor
    _log: Callable[[str], object]

    def __call__(self, images: Path, target: Path) -> None:
        """Write the map of the images in one folder into another.

        Raises
        ------
        QsmDeployError
            If there is none, in a sentence that names nobody.
        """
        try:
            self._worker.submit(self._make, images, target).result()
        except QsmDeployError as error:
            raise DataError(_anonymous(error, images)) from None

    def _make(self, images: Path, target: Path) -> None:
        log, stages = _Notes(self._log), Stages()
        with volumes_from(images, log) as (acquisition, files):
            echoes: dict[str, Any] = dict(files)
            out = DicomOut(target, acquisition)
            gives = self._reconstructor.needs.gives
            request = make_request((), dicom_out=out, gives=gives, **echoes)
            request = replace(request, wants=self._wants)
            scan, kept = measured_scan(request, self._reconstructor, log, stages)
            run_scan(request, self._reconstructor, scan, log, stages, kept)


def open_map_maker(
    maker: Maker, host: Host, wants: Wants, log: Callable[[str], object]
) -> MapMaker:
    """Load networks that begin with echoes or a field of them, or take a method.

    Raises
    ------
    UsageError
        If more is needed than echoes, or no susceptibility is given.
    QsmDeployError
        If it cannot be loaded.
    """
    worker = ThreadPoolExecutor(ONE)
    limited = within_process(wants, host.device, maker)
    opened = worker.submit(
        open_reconstructor, maker, host, _Notes(log), memory_limit=limited.memory_limit
    ).result()
    needs, name = opened.needs, opened.inversion.name
    if needs.maps or (needs.quantity == "local_field_ppm" and 1 not in needs.field_counts):
        takes = " and ".join((needs.quantity, *needs.maps))
        raise UsageError(f"{name} takes {takes}, of which a study of echoes has not all")
    require_susceptibility(needs.gives)
    return MapMaker(name, opened, limited, worker, log)


def _anonymous(error: QsmDeployError, images: Path) -> str:
    """Return what an error says, without what images say of people and what people wrote."""
    text = str(error).partition("; pass --")[0]  # which is for qsm-run
    if error.__cause__ is not None:  # of pydicom, which shows the values that it does not like
        text = text.replace(f": {error.__cause__}", "")
    with suppress(QsmDeployError):
        frames = read_frames(images).frames
        words = {word for frame in frames for word in frame.patient.split("\n")}
        words |= {frame.description for frame in frames}
        words |= {series.description for series in series_of(frames)}
        for word in sorted(words, key=len, reverse=True):
            if len(word) >= SHORT:
                text = text.replace(f" ({word})", "").replace(word, "...")
    return text.replace(f"{images}: ", "").replace(f"{images}/", "")
