"""A head's acquisition as a BIDS dataset, its truth and mask as a derivative."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qsm_deploy.calibration.phantom.orientation import affine_from_geometry
from qsm_deploy.calibration.phantom.phantom import Phantom
from qsm_deploy.runtime.bids.output import BIDS_VERSION
from qsm_deploy.runtime.bids.search import DESCRIPTION
from qsm_deploy.runtime.console.provenance import NAME, version
from qsm_deploy.runtime.job.report import json_bytes
from qsm_deploy.runtime.local_field.echoes import Echoes
from qsm_deploy.runtime.scan.nifti import nifti_bytes

SUBJECT = "sub-01/anat/sub-01"
TRUTH = "derivatives/qsm-phantom"
README = (
    "A drawn head, measured by simulation. The phase grows with the field. Its susceptibility,\n"
    f"brain mask and tissue labels are in {TRUTH}.\n"
)


def bids_files(head: Phantom, echoes: Echoes, params: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of a dataset of one subject, by their names in it.

    Parameters
    ----------
    head
        What was measured.
    echoes
        What was measured of it; raw data.
    params
        What the sidecar of the true map says of how the head was made.
    """
    about = {"Name": "qsm-phantom", "BIDSVersion": BIDS_VERSION}
    made = {"GeneratedBy": [{"Name": NAME, "Version": version()}]}
    chi = {"Description": "True magnetic susceptibility", "Units": "ppm", "SkullStripped": True}
    sidecars: dict[str, dict[str, Any]] = {
        DESCRIPTION: about | made | {"DatasetType": "raw"},
        f"{TRUTH}/{DESCRIPTION}": about | made | {"DatasetType": "derivative"},
        f"{TRUTH}/{SUBJECT}_Chimap.json": chi | params,
        f"{TRUTH}/{SUBJECT}_desc-brain_mask.json": {"Type": "Brain"},
    }
    volumes: dict[str, ArrayLike] = {
        f"{TRUTH}/{SUBJECT}_Chimap.nii.gz": head.chi_ppm,
        f"{TRUTH}/{SUBJECT}_desc-brain_mask.nii.gz": head.mask.astype(np.uint8),
        f"{TRUTH}/{SUBJECT}_dseg.nii.gz": head.labels,
    }
    for n, seconds in enumerate(echoes.echo_times_s):
        acquired = {"EchoTime": seconds, "MagneticFieldStrength": echoes.field_strength_t}
        stem = f"{SUBJECT}_echo-{n + 1}_part"
        volumes[f"{stem}-mag_MEGRE.nii.gz"] = echoes.magnitude[n]
        sidecars[f"{stem}-mag_MEGRE.json"] = acquired
        volumes[f"{stem}-phase_MEGRE.nii.gz"] = echoes.phase_rad[n]
        sidecars[f"{stem}-phase_MEGRE.json"] = acquired | {"Units": "rad"}
    affine = affine_from_geometry(head.geometry)
    return (
        {"README": README.encode()}
        | {name: json_bytes(content) for name, content in sidecars.items()}
        | {name: nifti_bytes(data, affine) for name, data in volumes.items()}
    )
