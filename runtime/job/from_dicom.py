"""``qsm-run --dicom``: from a folder of DICOM to the files that a run begins with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.console.held import scratch_folder
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.dicom.acquisition import Acquisition


@contextmanager
def volumes_from(
    folder: Path,
    log: TerminalLog,
    *,
    series: Sequence[int] = (),
    field_strength: float | None = None,
) -> Iterator[tuple[Acquisition, dict[str, list[Path]]]]:
    """Convert the gradient echo of a folder, and keep its volumes while the body runs.

    Parameters
    ----------
    folder
        With the images of one study.
    log
        Takes a line on what is taken.
    series
        As for :func:`acquisition_of`.
    field_strength
        As the user states it [T], where the images do not.

    Yields
    ------
    tuple
        The images, and the files by the names of flags: phase and magnitude, or real and imag.

    Raises
    ------
    QsmDeployError
        As :func:`read_frames`, :func:`acquisition_of` and :func:`convert`.
    """
    from qsm_deploy.runtime.dicom.choice import acquisition_of
    from qsm_deploy.runtime.dicom.conversion import convert
    from qsm_deploy.runtime.dicom.frames import read_frames

    log.stage("reading DICOM headers")
    acquisition = acquisition_of(read_frames(folder), folder, series)
    if acquisition.field_strength_t is None and field_strength is None:
        raise UsageError(
            f"series {acquisition.slices[0].series_number} says neither MagneticFieldStrength nor "
            "ImagingFrequency; pass --field-strength in tesla"
        )
    log.tell(str(acquisition))
    log.stage("converting DICOM")
    with scratch_folder() as made:
        yield acquisition, convert(acquisition, made)


def folder_series(folder: Path) -> str:
    """Return a line for every series of a folder.

    Raises
    ------
    DataError
        If it holds no MR image, or one is damaged.
    """
    from qsm_deploy.runtime.dicom.choice import list_series
    from qsm_deploy.runtime.dicom.frames import read_frames

    return list_series(read_frames(folder), folder)
