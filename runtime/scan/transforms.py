"""Which of a NIfTI header's two transforms tells where B0 was: the scanner's, not a template's.

The code of a qform or sform says where its coordinates come from: 1 the scanner, 2 another scan
that the volume was aligned to, 3 to 5 a template. Programs write them as they like, so that one
header often holds two that disagree.

References
----------
nifti1.h, "Methods 2 and 3".
"""

from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np
from nibabel.nifti1 import xform_codes
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import GeometryError
from qsm_deploy.kernels.geometry import LARGEST_SHEAR_DEG, Geometry, shear_deg, vector_text

Affine = NDArray[np.float64]

SCANNER, ALIGNED = 1, 2
SPACES = {1: "scanner", 2: "aligned", 3: "Talairach", 4: "MNI", 5: "template"}
SAME_DEG, SAME_SIZE = 2.0, 0.01
LEAST_COSINE = 0.7  # between axes of one name: 45 degrees
QUATERNION_ROUNDING = 2e-5  # of five digits, in the square of the norm
MM_PER_UNIT = {1: 1000.0, 3: 1e-3}  # metre, micrometre; anything else is taken for mm
UNIT_NAMES = {1: "metres", 3: "micrometres"}
STATE = "pass --b0-direction X Y Z in voxel axes"


@dataclass(frozen=True)
class Transforms:
    """What a header says of where its voxels lie.

    Attributes
    ----------
    affine
        (4, 4) from voxels to RAS [mm], for voxel size and B0.
    all
        Every valid one, by which a mask made by another program may lie on the same grid.
    notes
        What the user should know of the choice.
    doubt
        Why it does not tell where B0 was, if it does not.
    source
        The form that it is, in words; ``None`` where the header has none, and directions are not
        known.
    is_rounded
        Whether its directions are those of a quaternion of single precision, which depend in the
        seventh digit on the order of storage.
    """

    affine: Affine
    all: tuple[Affine, ...]
    notes: tuple[str, ...] = ()
    doubt: str | None = None
    source: str | None = None
    is_rounded: bool = False


@dataclass(frozen=True)
class _Form:
    name: str
    code: int
    affine: Affine

    def __str__(self) -> str:
        return f"{self.name} ({SPACES[self.code]})"

    @property
    def grid(self) -> Geometry:
        return Geometry.from_affine((2, 2, 2), self.affine)

    def differs(self, other: "_Form") -> str | None:
        """Say how, if not only by rounding."""
        mine, its = self._axes(), other._axes()
        angle = float(np.degrees(np.arccos(min(1, abs(float(mine[2] @ its[2]))))))
        if angle > SAME_DEG:
            return f"lies {angle:.0f} degrees off"
        sizes = [np.linalg.norm(form.affine[:3, :3], axis=0) for form in (self, other)]
        if np.abs(sizes[0] / sizes[1] - 1).max() > SAME_SIZE:
            return f"has other voxel sizes, {vector_text(tuple(sizes[1]))} mm"
        one, two = (f.affine[:3, :3] / n for f, n in zip((self, other), sizes, strict=True))
        if (one * two).sum(axis=0).min() < LEAST_COSINE:
            return f"names other axes, {''.join(map(str, nib.aff2axcodes(other.affine)))}"
        return None

    def _axes(self) -> NDArray[np.float64]:
        """Return the unit vectors of the scanner's axes in voxel axes, as rows."""
        linear = self.affine[:3, :3]
        axes = linear / np.linalg.norm(linear, axis=0)
        rows: NDArray[np.float64] = axes / np.linalg.norm(axes, axis=1, keepdims=True)
        return rows


def transforms_of(header: nib.Nifti1Header) -> Transforms:
    """Return the transform that tells B0 and voxel size, and what is to be said of it.

    A quaternion that is longer than one by the rounding of five digits is made one in the header.

    Raises
    ------
    GeometryError
        If a header that has a transform has no valid one.
    """
    unit = int(header["xyzt_units"]) & 7
    scale = np.diag([*[MM_PER_UNIT.get(unit, 1.0)] * 3, 1.0])
    notes = [f"the header gives lengths in {UNIT_NAMES[unit]}"] if unit in UNIT_NAMES else []
    found = [form for form in (_qform(header), _sform(header)) if form is not None]
    forms = [replace(form, affine=scale @ form.affine) for form in found]
    if not forms and (_code(header, "qform_code") or _code(header, "sform_code")):
        raise GeometryError(
            "neither qform nor sform is valid (a quaternion longer than one, a singular affine, or "
            "numbers that are not finite); correct the header"
        )
    if not forms:
        affine = scale @ header.get_base_affine()
        note = "the header has neither qform nor sform: taking B0 along the third voxel axis"
        return Transforms(affine, (affine,), (*notes, note))
    chosen, said, doubt = _choice(forms)
    return Transforms(
        chosen.affine,
        tuple(form.affine for form in forms),
        (*notes, *said),
        doubt,
        str(chosen),
        chosen.name == "qform",
    )


def _choice(forms: list[_Form]) -> tuple[_Form, list[str], str | None]:
    """Return the form to take, notes, and why it does not tell B0, if it does not."""
    *_, preferred = [f for f in forms if shear_deg(f.affine) <= LARGEST_SHEAR_DEG] or forms
    for code in (SCANNER, ALIGNED):
        having = [form for form in forms if form.code == code]
        if not having:
            continue
        chosen = preferred if preferred in having else having[-1]
        others = [form for form in forms if form is not chosen]
        apart = next((how for other in others if (how := chosen.differs(other))), None)
        if len(having) == 2 and apart and shear_deg(having[1].affine) <= LARGEST_SHEAR_DEG:
            both = " and ".join(f"{f.name} {vector_text(f.grid.b0_direction)}" for f in having)
            says = f"qform and sform both say {SPACES[code]}, and the {others[0].name} {apart}"
            return chosen, [], f"{says}: B0 along {both}; correct the header, or {STATE}"
        notes = [f"B0 from the {chosen}; the {others[0]} {apart}"] if apart else []
        if code == ALIGNED:
            notes.append(
                f"the header says aligned, not scanner: if this volume was registered, {STATE}"
            )
        return chosen, notes, None
    space = f"the volume is in template space ({SPACES[preferred.code]})"
    return preferred, [], f"{space}: where B0 was is not in the header; {STATE}"


def _qform(header: nib.Nifti1Header) -> _Form | None:
    if not (code := _code(header, "qform_code")):
        return None
    names = ("quatern_b", "quatern_c", "quatern_d")
    square = float(sum(header[name].astype(np.longdouble) ** 2 for name in names))
    if 1 < square <= 1 + QUATERNION_ROUNDING:
        for name in names:
            header[name] = np.float32(float(header[name]) / np.sqrt(square) * (1 - 1e-7))
    try:
        return _valid("qform", code, header.get_qform(coded=False))
    except (HeaderDataError, ValueError):
        return None


def _sform(header: nib.Nifti1Header) -> _Form | None:
    code = _code(header, "sform_code")
    return _valid("sform", code, header.get_sform(coded=False)) if code else None


def _valid(name: str, code: int, affine: Affine | None) -> _Form | None:
    """Return a form, if its affine is finite and not singular."""
    if affine is None or not np.isfinite(affine).all():
        return None
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not sizes.min() > 0 or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-6:
        return None
    return _Form(name, code, np.asarray(affine, dtype=np.float64))


def _code(header: nib.Nifti1Header, name: str) -> int:
    code = int(header[name])
    if code not in xform_codes.value_set():
        raise GeometryError(
            f"the header's {name} is {code}, which means nothing; correct the header"
        )
    return code
