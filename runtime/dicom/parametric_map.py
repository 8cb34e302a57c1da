"""A map as one Parametric Map of floats (PS3.3, A.75), for research archives."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.runtime.console.provenance import NAME, version
from qsm_deploy.runtime.dicom.acquisition import Acquisition, affine_of
from qsm_deploy.runtime.dicom.derived_images import file_bytes, phase_of
from qsm_deploy.runtime.dicom.frames import damaged
from qsm_deploy.runtime.dicom.headers import WHERE
from qsm_deploy.runtime.dicom.map_series import (
    ASKED_FOR,
    PPB,
    SUSCEPTIBILITY,
    WINDOW_CENTRE_PPB,
    WINDOW_EXPLANATION,
    WINDOW_WIDTH_PPB,
    MapSeries,
    state_side,
)

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

REACH_PPB = 1e6  # of what the unit is said for: all that is possible
KEPT = (*ASKED_FOR, "SpecificCharacterSet", "TimezoneOffsetFromUTC")
REFERRED = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"),
    *("FrameOfReferenceUID", "NumberOfFrames"),
)


def parametric_map(ppb: NDArray[np.float32], acquisition: Acquisition, series: MapSeries) -> bytes:
    """Return the file of a map.

    Parameters
    ----------
    ppb
        (slice, row, column) susceptibility.
    acquisition
        What it was made of.
    series
        What it is.
    """
    from highdicom import (
        PixelMeasuresSequence,
        PlaneOrientationSequence,
        PlanePositionSequence,
        VOILUTTransformation,
    )
    from highdicom.pm import ParametricMap, RealWorldValueMapping
    from pydicom.datadict import dictionary_VR
    from pydicom.dataelem import DataElement
    from pydicom.sr.coding import Code
    from pydicom.uid import generate_uid

    slices = acquisition.slices
    first, between = slices[0], float(np.linalg.norm(affine_of(slices)[:3, 2]))
    with damaged(first.path):
        sources, further = _sources(acquisition)
        kept = [sources[0][keyword] for keyword in KEPT if keyword in sources[0]]
        for keyword in ASKED_FOR:  # highdicom is stricter with them than scanners are
            sources[0].add(DataElement(keyword, dictionary_VR(keyword), None))
        for source in sources:
            source.setdefault("SliceThickness", between)
        made = ParametricMap(
            sources,
            ppb,
            series_instance_uid=series.uid,
            series_number=series.number,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer=NAME,
            manufacturer_model_name="QSM",
            software_versions=version(),
            device_serial_number="0",
            contains_recognizable_visual_features=False,
            real_world_value_mappings=[
                RealWorldValueMapping(
                    lut_label="QSM",
                    lut_explanation="magnetic susceptibility",
                    unit=Code(*PPB),
                    value_range=(-REACH_PPB, REACH_PPB),
                    quantity_definition=Code(*SUSCEPTIBILITY),
                )
            ],
            voi_lut_transformations=[
                VOILUTTransformation(WINDOW_CENTRE_PPB, WINDOW_WIDTH_PPB, WINDOW_EXPLANATION)
            ],
            content_label="QSM",
            pixel_measures=PixelMeasuresSequence(first.spacing_mm, between, between),
            plane_orientation=PlaneOrientationSequence(
                "PATIENT", first.orientation.ravel().tolist()
            ),
            plane_positions=[
                PlanePositionSequence("PATIENT", f.position_mm.tolist()) for f in slices
            ],
            further_source_images=further,
            specific_character_set=None,  # that of the source, below
        )
        for element in kept:
            made.add(element)
        state_side(made, sources[0])
        series.describe(made)
        return file_bytes(made)


def _sources(acquisition: Acquisition) -> tuple[Sequence["Dataset"], Sequence["Dataset"]]:
    """Return the headers of what a map lies on, and of what else it is made of.

    The first are those of the slices, or the file that has them all as frames; the others are of
    the phase, or of both parts, of all echoes.
    """
    from pydicom import dcmread

    paths = [*dict.fromkeys(f.path for frames in phase_of(acquisition) for f in frames)]
    count = 1 if acquisition.slices[0].number is not None else len(acquisition.slices)
    own = [dcmread(path, stop_before_pixels=True) for path in paths[:count]]
    tags = [*REFERRED, *WHERE]
    others = [dcmread(p, stop_before_pixels=True, specific_tags=tags) for p in paths[count:]]
    return own, others
