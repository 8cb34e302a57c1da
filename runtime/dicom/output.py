"""The maps of a run as DICOM, beside the gradient echo that they were made of."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.console.atomic import check_writable
from qsm_deploy.runtime.console.command import require_installed
from qsm_deploy.runtime.dicom.acquisition import Acquisition, as_images
from qsm_deploy.runtime.dicom.burn_in import burn_in, letters_of
from qsm_deploy.runtime.dicom.derived_images import images_of
from qsm_deploy.runtime.dicom.frames import classics
from qsm_deploy.runtime.dicom.map_series import MapSeries, now_beside, require_susceptibility
from qsm_deploy.runtime.dicom.parametric_map import parametric_map
from qsm_deploy.runtime.scan.axes import Affine
from qsm_deploy.runtime.scan.units import PPB_PER_PPM

Kind = Literal["mr", "pm"]
SOURCE_STEP, FIRST = 100, 1  # the series after those of the source
MOST = 2**31 - 1  # of a series number, VR IS


@dataclass(frozen=True)
class DicomOut:
    """What is written of the maps of one acquisition, and where.

    Attributes
    ----------
    folder
        Made if it is missing.
    acquisition
        What the maps were made of, whose patient and study they belong to.
    kind
        An MR image of each slice, whole ppb, or one Parametric Map of floats.
    series_number
        Of the first map, those after it follow; else that of the source x 100 + 1.
    burn_in
        A text to draw at the top left of every image.
    """

    folder: Path
    acquisition: Acquisition
    kind: Kind = "mr"
    series_number: int | None = None
    burn_in: str | None = None

    def check(self, names: Collection[str] = ("chi_ppm",), *, force: bool) -> None:
        """Refuse what cannot be written, before any work is done.

        Parameters
        ----------
        names
            Of the maps that are to be written, in cards.
        force
            Whether the files of an earlier run are replaced.

        Raises
        ------
        UsageError
            If a map is no susceptibility, the folder holds other files or, without force, files
            at all, the series number is none, or the text cannot be drawn.
        MissingDependencyError
            If what draws the text, or writes a Parametric Map, is not installed.
        DataError
            If the folder cannot be written to, or the images say in no frame of reference where
            they lie.
        """
        require_susceptibility(names)
        if self.kind == "pm":
            require_installed(["highdicom"], "dicom", "a Parametric Map")
        if not 1 <= self._number(len(names) - 1) <= MOST or self._number(0) < 1:
            raise UsageError(
                f"series number {self._number(0)}: pass one from 1 to {MOST} with --dicom-series"
            )
        if not self.acquisition.slices[0].frame_of_reference:
            raise DataError(
                f"{self.acquisition.slices[0].path} has no frame of reference (0020,0052), without "
                "which no viewer lays a map on its images; write the map as NIfTI"
            )
        if self.burn_in is not None:
            if self.kind == "pm":
                raise UsageError("--burn-in: a Parametric Map has no text; use kind mr")
            require_installed(["PIL"], "dicom", "--burn-in", "pillow")
            letters_of(self.burn_in, self.acquisition.slices[0].shape)
        self._check_folder([p.name for name in names for p in self._paths(name)], force=force)

    def _check_folder(self, names: Collection[str], *, force: bool) -> None:
        if not self.folder.is_dir():
            if os.path.lexists(self.folder):
                raise DataError(f"{self.folder} is no folder; choose another output")
            check_writable(self.folder, force=False)
            return
        for name in names:
            check_writable(self.folder / name, force=force)
        others = sorted({*os.listdir(self.folder)} - {*names})
        if others:
            raise UsageError(
                f"{self.folder} holds {len(others)} files that are none of this map, {others[0]} "
                "among them; a viewer would load all; choose an empty folder"
            )

    def files(
        self, maps_ppm: Mapping[str, Volume], affine: Affine, run: Mapping[str, Any]
    ) -> dict[Path, bytes]:
        """Return the files of all maps.

        Parameters
        ----------
        maps_ppm
            (x, y, z) susceptibility, in any storage of the grid of the images, by names in cards.
        affine
            (4, 4) from their voxels to RAS [mm].
        run
            What the report says of how they were made.

        Raises
        ------
        UsageError
            If a map is no susceptibility.
        DataError
            If it lies on another grid than the images, those cannot be read any more, or the
            folder cannot be made.
        """
        require_susceptibility(maps_ppm)
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self.folder} cannot be made ({error.strerror}); choose another folder"
            ) from error
        return dict(
            file
            for n, (name, volume) in enumerate(maps_ppm.items())
            for file in self._files(n, name, volume, affine, run)
        )

    def _files(
        self, n: int, name: str, volume: Volume, affine: Affine, run: Mapping[str, Any]
    ) -> Iterator[tuple[Path, bytes]]:
        from pydicom.uid import generate_uid

        slices = self.acquisition.slices
        ppb = as_images(volume, affine, slices)
        if np.shares_memory(ppb, volume):
            ppb = ppb.copy()
        ppb *= PPB_PER_PPM
        made = now_beside(next(classics(slices[:1])))
        series = MapSeries(name, generate_uid(), self._number(n), made, run)
        if self.burn_in is not None:
            burn_in(ppb, letters_of(self.burn_in, slices[0].shape))
        contents: Iterable[bytes] = (
            [parametric_map(ppb, self.acquisition, series)]
            if self.kind == "pm"
            else images_of(ppb, self.acquisition, series, burned=self.burn_in is not None)
        )
        yield from zip(self._paths(name), contents, strict=True)

    def _number(self, n: int) -> int:
        """Return the number of the series of the map of that index."""
        source = self.acquisition.slices[0].series_number
        first = source * SOURCE_STEP + FIRST if self.series_number is None else self.series_number
        return first + n

    def _paths(self, name: str) -> list[Path]:
        """Return the files of a map, along its slices."""
        stem = name.removesuffix("_ppm").replace("_", "-")
        if self.kind == "pm":
            return [self.folder / f"{stem}.dcm"]
        return [
            self.folder / f"{stem}_{n:04}.dcm" for n in range(1, len(self.acquisition.slices) + 1)
        ]
