"""The files that a run writes, checked before any work is done."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.console.atomic import check_writable
from qsm_deploy.runtime.reconstruction.inversion import CHI

if TYPE_CHECKING:
    from qsm_deploy.runtime.dicom.output import DicomOut

# what is given, in the order in which one follows another, as files are called
MAP_NAMES = {
    "local_field_ppm": "localfield",
    CHI: "chi",
    "chi_positive_ppm": "chi-positive",
    "chi_negative_ppm": "chi-negative",
}
OutUnits = Literal["ppm", "ppb"]
OutDtype = Literal["float32", "int16"]


@dataclass(frozen=True)
class Outputs:
    """The files that a run writes.

    Attributes
    ----------
    chi
        The map, or what else is given; a run that writes none has its map in memory only.
    further
        What is given after the first, by the names in cards.
    dicom
        The images that the map is written as.
    report, figure, html
        If they were asked for.
    units, dtype
        Of the map, as it is stored.
    force
        Whether existing ones are overwritten.
    slices, window
        Where the planes of figure and page lie, and the susceptibility that they show, in
        ``units``.
    html_names, name
        Whether the page names the files; that of the recording, in a cohort.
    maps
        Those on the way to the field that are kept, by name.
    """

    chi: Path | None = None
    report: Path | None = None
    figure: Path | None = None
    units: OutUnits = "ppm"
    dtype: OutDtype = "float32"
    force: bool = False
    slices: Sequence[float] | None = None
    window: Sequence[float] | None = None
    maps: Mapping[str, Path] = field(default_factory=dict)
    dicom: "DicomOut | None" = None
    further: Mapping[str, Path] = field(default_factory=dict)
    html: Path | None = None
    html_names: bool = False
    name: str = ""

    @property
    def given(self) -> tuple[Path, ...]:
        """The files of all that is given, in order."""
        return () if self.chi is None else (self.chi, *self.further.values())

    @property
    def shown(self) -> tuple[Path, ...]:
        """What a user is told of: these files, and the folder of images."""
        return self.given if self.dicom is None else (*self.given, self.dicom.folder)

    @property
    def sidecars(self) -> tuple[Path, ...]:
        """What is said of each, beside it, JSON."""
        return tuple(path.with_name(f"{_stem(path)}.json") for path in self.given)

    def check(self, inputs: Iterable[Path | None]) -> None:
        """Refuse outputs that collide or cannot be written, before any work is done."""
        self._check_names()
        self._check_look()
        read = {path.resolve() for path in inputs if path is not None}
        written: set[Path] = set()
        written_too = (self.report, self.figure, self.html, *self.maps.values())
        for path in (*self.given, *self.sidecars, *written_too):
            if path is None:
                continue
            if path.resolve() in read:
                raise UsageError(f"{path} is an input of this run; choose another output")
            if path.resolve() in written:
                raise UsageError(f"two outputs would go to {path}; choose another name for one")
            if self.dicom is not None and path.resolve().parent == self.dicom.folder.resolve():
                raise UsageError(
                    f"{path} would lie among the images of --dicom-out, and viewers open all of a "
                    "folder; choose another"
                )
            written.add(path.resolve())
            check_writable(path, force=self.force)
        for sidecar in self.sidecars:
            if sidecar.exists():
                from qsm_deploy.runtime.console.sidecar import require_replaceable

                require_replaceable(sidecar)

    def _check_look(self) -> None:
        """Refuse to draw without the library for it, or what cannot be looked at."""
        if self.html_names and self.html is None:
            raise UsageError("--html-names is of a page; add --html FILE.html")
        if self.figure is None and self.html is None:
            if self.slices is not None or self.window is not None:
                raise UsageError(
                    "--slices and --window are of a picture; add --figure FILE.png or --html "
                    "FILE.html"
                )
            return
        from qsm_deploy.runtime.page.figure import require_look, require_matplotlib

        require_look(self.slices, self.window)
        if self.figure is not None:
            require_matplotlib()

    def _check_names(self) -> None:
        for name, path in {"output": self.chi, **self.maps}.items():
            if path is not None and not path.name.endswith((".nii", ".nii.gz")):
                raise UsageError(f"--{name.replace('_', '-')} {path} must end in .nii or .nii.gz")
        for name, path, suffix in (("figure", self.figure, ".png"), ("html", self.html, ".html")):
            if path is not None and path.suffix != suffix:
                raise UsageError(f"--{name} {path} must end in {suffix}")


def require_dtype(dtype: str, gives: Sequence[str]) -> None:
    """Refuse a type that maps are not stored in, or whole ppb of what is no susceptibility.

    Raises
    ------
    UsageError
        If it is one of these.
    """
    if dtype not in get_args(OutDtype):
        raise UsageError(f"out_dtype is {dtype!r}, expected one of {', '.join(get_args(OutDtype))}")
    others = [name for name in gives if not name.startswith("chi")]
    if dtype == "int16" and others:
        raise UsageError(
            f"--out-dtype int16 is whole ppb of susceptibility, and {others[0]} is made; drop "
            "the flag"
        )


def output_files(output: Path, gives: Sequence[str]) -> dict[str, Path]:
    """Return where each of what is given goes: one as it was said, several with their names."""
    if len(gives) == 1:
        return {gives[0]: output}
    end = output.name[len(_stem(output)) :]
    return {name: output.with_name(f"{_stem(output)}_{MAP_NAMES[name]}{end}") for name in gives}


def beside(field: Path, gives: Sequence[str]) -> Path:
    """Return where what is made of a field goes unless told otherwise."""
    name = f"_{MAP_NAMES[gives[0]]}" if len(gives) == 1 else ""
    return field.with_name(f"{_stem(field)}{name}.nii.gz")


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
