"""What a susceptibility map says of itself in DICOM, whatever kind of object holds it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.console.provenance import NAME, made_by, version

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

LABELS = {  # by the names in cards
    "chi_ppm": "chi",
    "chi_positive_ppm": "chi positive",
    "chi_negative_ppm": "chi negative",
}
Code = tuple[str, str, str]
PPB: Code = ("[ppb]", "UCUM", "parts per billion")
QUANTITY: Code = ("246205007", "SCT", "Quantity")
SUSCEPTIBILITY: Code = ("126396", "DCM", "Magnetic Susceptibility")
PROCESSING_EQUIPMENT: Code = ("109102", "DCM", "Processing Equipment")
WINDOW_CENTRE_PPB, WINDOW_WIDTH_PPB = 0, 400
WINDOW_EXPLANATION = "QSM -200 to 200 ppb"
ASKED_FOR = (  # of every image, though it may be empty (type 2), and not written by all scanners
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
LONGEST = 64, 1024  # characters of a short and of a long text (VR LO, ST)


@dataclass(frozen=True)
class MapSeries:
    """One map, a series of its own in the study of its source.

    Attributes
    ----------
    name
        Of the map, in cards.
    uid, number
        Of the series.
    made
        When.
    run
        What the report says of how.
    """

    name: str
    uid: str
    number: int
    made: datetime
    run: Mapping[str, Any]

    def describe(self, image: "Dataset", notes: Iterable[str] = ()) -> None:
        """Say what an image of the map is, how it came about, and that it is research.

        Parameters
        ----------
        image
            Whose instance and pixels are nobody's business here.
        notes
            What else a reader of the image should know.
        """
        date, time = f"{self.made:%Y%m%d}", f"{self.made:%H%M%S.%f}"
        for kind in ("Series", "Content", "InstanceCreation"):
            setattr(image, f"{kind}Date", date)
            setattr(image, f"{kind}Time", time)
        image.SeriesInstanceUID, image.SeriesNumber = self.uid, self.number
        image.SeriesDescription = f"QSM {LABELS[self.name]} [ppb] RESEARCH"
        image.ContentQualification = "RESEARCH"
        image.DerivationDescription = self._how[: LONGEST[1]]
        image.ImageComments = "; ".join(("research, not for diagnosis", *notes))
        before = image.get("ContributingEquipmentSequence") or ()
        # a new element, as frames of one file share theirs
        image.add_new("ContributingEquipmentSequence", "SQ", [*before, self._equipment()])

    @property
    def _how(self) -> str:
        """Which network or method made it of what."""
        model = self.run.get("model", {})
        sha256 = model.get("weights_sha256")
        who = model.get("network") or model.get("method") or self.run.get("title") or "QSM"
        weights = f", weights sha256 {sha256}" if sha256 else ""
        return _ascii(
            f"susceptibility [ppb] from the phase of a gradient echo by {who}{weights}; {made_by()}"
        )

    def _equipment(self) -> "Dataset":
        return dataset(
            PurposeOfReferenceCodeSequence=[coded(PROCESSING_EQUIPMENT)],
            Manufacturer=NAME,
            ManufacturerModelName=_ascii(self.run.get("title") or "QSM")[: LONGEST[0]],
            SoftwareVersions=version(),
            ContributionDateTime=f"{self.made:%Y%m%d%H%M%S.%f}",
            ContributionDescription=self._how[: LONGEST[1]],
        )


def require_susceptibility(names: Iterable[str]) -> None:
    """Refuse what is no susceptibility.

    Raises
    ------
    UsageError
        If one of the names, in cards, is another quantity's.
    """
    for name in names:
        if name not in LABELS:
            raise UsageError(
                f"{name} is no susceptibility, which alone is written as DICOM; write it as NIfTI"
            )


def state_side(image: "Dataset", source: "Dataset") -> None:
    """Say which part of the body it is, and of which side where it may be one of a pair.

    A part that is not known may be; that of a brain, which is none, is not asked for.
    """
    part, side = source.get("BodyPartExamined"), source.get("Laterality")
    if part:
        image.BodyPartExamined = part
    if side or not (part or image.get("AnatomicRegionSequence")):
        image.Laterality = side or None
    elif "Laterality" in image:
        del image.Laterality


def now_beside(image: "Dataset") -> datetime:
    """Return what the clock shows in the time zone of an image, if it states one."""
    offset = str(image.get("TimezoneOffsetFromUTC", "") or "")
    try:
        sign, hours, minutes = int(f"{offset[0]}1"), int(offset[1:3]), int(offset[3:5])
        return datetime.now(timezone(sign * timedelta(hours=hours, minutes=minutes)))
    except (ValueError, IndexError):
        return datetime.now()


def dataset(**elements: object) -> "Dataset":
    """Return a data set of elements, by keyword."""
    from pydicom.dataset import Dataset

    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return made


def coded(code: Code) -> "Dataset":
    """Return a concept as DICOM writes it."""
    value, scheme, meaning = code
    return dataset(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)


def _ascii(text: str) -> str:
    """Return a text that is the same in every character set of DICOM."""
    return text.encode("ascii", "replace").decode().replace("\\", "/")
