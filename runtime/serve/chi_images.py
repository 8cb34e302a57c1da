"""Susceptibility maps as images: ppb in whole numbers on one fixed scale for every patient."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.console.provenance import made_by
from qsm_deploy.runtime.scan.units import PPB_PER_PPM
from qsm_deploy.runtime.serve.codec import image_frames
from qsm_deploy.runtime.serve.stacks import Stack

Codes = NDArray[np.uint16]

ZERO, LOWEST, HIGHEST = 2048, 1, 4095  # twelve bits; 0 is left for what has no value
WINDOW_CENTRE_PPB, WINDOW_WIDTH_PPB = 0, 400  # whole numbers: hosts cut fractions off
FIRST_SERIES = 99  # the convention of hosts for what was derived
MAGNITUDE_TYPE = 1
# how the host turned the pixels; everything else in the source's attributes is about the source
KEPT_ATTRIBUTES = ("ImageRowDir", "ImageColumnDir", "ImageSliceNormDir", "PatientPosition")


@dataclass(frozen=True)
class ChiCodes:
    """A map in the numbers of its images.

    Attributes
    ----------
    codes
        (x, y, z) uint16; the susceptibility is ``codes - 2048`` ppb.
    clipped
        How many voxels lie beyond the scale, at whose bound they are.
    """

    codes: Codes
    clipped: int


def encode_chi(chi_ppm: Volume) -> ChiCodes:
    """Round a susceptibility map [ppm] to ppb, within 2.047 ppm of zero."""
    codes = np.empty(chi_ppm.shape, dtype=np.uint16)
    clipped = 0
    for plane, out in zip(chi_ppm, codes, strict=True):  # a copy in double precision stays small
        exact = np.rint(plane.astype(np.float64) * PPB_PER_PPM) + ZERO
        bounded = np.clip(exact, LOWEST, HIGHEST)
        clipped += int(np.count_nonzero(bounded != exact))
        out[...] = bounded
    return ChiCodes(codes, clipped)


def chi_frames(codes: Codes, stack: Stack, series: int, comment: str) -> Iterator[bytes]:
    """Return the IMAGE messages of a map, cut and placed as its source was.

    Parameters
    ----------
    codes
        (x, y, z) as :func:`encode_chi` makes them.
    stack
        The images that the map was made of.
    series
        Index of the new series.
    comment
        What a reader of the images should know.
    """
    per_image = codes.shape[2] // len(stack.images)
    common = _common_attributes(len(stack.images), comment)
    for n, image in enumerate(stack.images):
        slab = codes[:, :, n * per_image : (n + 1) * per_image]
        head = type(image.head).from_buffer_copy(image.head)
        head.flags = 0
        head.image_type = MAGNITUDE_TYPE
        head.contrast = 0
        head.image_series_index = series
        head.image_index = n + 1
        own = {"SliceNo": [str(head.slice)], "ImageNumber": [str(n + 1)]}
        kept = {k: v for k in KEPT_ATTRIBUTES if (v := image.attributes.get(k))}
        yield image_frames(head, kept | common | own, slab.transpose(2, 1, 0))


def free_series(taken: set[int]) -> int:
    """Return the first index for derived series that no source has."""
    return next(n for n in range(FIRST_SERIES, 2**16) if n not in taken)


def _common_attributes(count: int, comment: str) -> dict[str, list[str]]:
    return {
        "DataRole": ["Image", "Quantitative"],
        "ImageType": ["DERIVED\\PRIMARY\\M\\QSM"],
        "SeriesDescription": ["QSM chi [ppb]"],
        "SequenceDescriptionAdditional": ["QSM"],
        "ImageComments": [comment],
        "ImageProcessingHistory": [made_by()],
        "RescaleSlope": ["1.0"],
        "RescaleIntercept": [f"{-float(ZERO)}"],
        "WindowCenter": [str(WINDOW_CENTRE_PPB)],
        "WindowWidth": [str(WINDOW_WIDTH_PPB)],
        "Keep_image_geometry": ["1"],
        "NumberOfSlices": [str(count)],
        "ImagesInAcquisition": [str(count)],
    }
