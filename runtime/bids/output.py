"""What a run over a BIDS dataset writes: a derivative dataset beside the data it is made of."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.bids.layout import BidsImage, Recording
from qsm_deploy.runtime.bids.search import DESCRIPTION
from qsm_deploy.runtime.console.atomic import write_atomically
from qsm_deploy.runtime.console.held import held
from qsm_deploy.runtime.console.journal import PREFIX, clear_leftovers
from qsm_deploy.runtime.console.provenance import NAME, version
from qsm_deploy.runtime.job.report import json_bytes
from qsm_deploy.runtime.reconstruction.inversion import CHI
from qsm_deploy.runtime.scan.params import load_json_object

BIDS_VERSION = "1.10.0"
# what BIDS has no name for: the table of all recordings, and what became of each
IGNORED = ".bidsignore", b"group_*.tsv\noutcomes\n"
# of what is given
SUFFIXES = {CHI: "Chimap", "local_field_ppm": "desc-local_fieldmap"}
DESCRIPTIONS = {CHI: "Magnetic susceptibility", "local_field_ppm": "Field of the sources inside"}
SOURCE = "source"  # the name of the input in links and BIDS URIs


@dataclass(frozen=True)
class Derivative:
    """A derivative dataset.

    Attributes
    ----------
    root
        Its folder.
    dataset
        The dataset that it is made of.
    gives
        What is made of each recording, by its name in cards.
    """

    root: Path
    dataset: Path
    gives: str = CHI

    def chi(self, recording: Recording) -> Path:
        """Return where the map of a recording goes."""
        return self._file(recording, ".nii.gz")

    def sidecar(self, recording: Recording) -> Path:
        """Return where what is known of the map goes."""
        return self._file(recording, ".json")

    @property
    def table(self) -> Path:
        """Where the table of all maps goes."""
        return self.root / f"group_{SUFFIXES[self.gives]}.tsv"

    def _file(self, recording: Recording, ending: str) -> Path:
        return self.root / recording.folder / f"{recording.name}_{SUFFIXES[self.gives]}{ending}"

    def require_ours(self) -> None:
        """Check that the folder is free, or was made by this program.

        Raises
        ------
        UsageError
            If another one made it, or it holds the maps of another dataset.
        """
        path, dataset = self.root / DESCRIPTION, os.path.realpath(self.dataset)
        if os.path.realpath(self.root) == os.path.join(dataset, "derivatives"):
            raise UsageError(f"{self.root} is a folder of datasets; choose one in it as --output")
        if not os.path.lexists(path):
            return
        content = load_json_object(path)
        links = content.get("DatasetLinks")
        source = links.get(SOURCE) if isinstance(links, dict) else None
        try:
            of = os.path.realpath(self.root / source) if isinstance(source, str) else dataset
        except ValueError:  # what no file can be called
            of = dataset
        if of != dataset and os.path.isdir(of):
            raise UsageError(
                f"{self.root} holds the maps of {of}, and subjects of two datasets may have one "
                "name; choose another --output"
            )
        makers = content.get("GeneratedBy")
        known = makers if isinstance(makers, list) else []
        if NAME not in [maker.get("Name") for maker in known if isinstance(maker, dict)]:
            raise UsageError(
                f"{self.root} holds a dataset that {NAME} did not make; choose another --output"
            )

    def describe(self) -> None:
        """Write the dataset's description, and what a validator passes over, unless it has them.

        Raises
        ------
        DataError
            If it cannot be written.
        """
        make_folder(self.root)
        source = load_json_object(self.dataset / DESCRIPTION)
        for name, content in ((DESCRIPTION, json_bytes(self._description(source))), IGNORED):
            path = self.root / name
            if not path.exists():
                with contextlib.suppress(UsageError):  # another process was quicker, with the same
                    write_atomically(path, content, force=False)

    def _description(self, source: dict[str, Any]) -> dict[str, Any]:
        doi, where = source.get("DatasetDOI"), (self.dataset, self.root)
        return {
            "Name": f"Susceptibility maps of {source['Name']}",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": NAME, "Version": version()}],
            "SourceDatasets": [{"DOI": doi} if doi else {"URL": f"bids:{SOURCE}:"}],
            "DatasetLinks": {SOURCE: os.path.relpath(*map(os.path.realpath, where))},
        }

    def labels(
        self, images: Iterable[BidsImage], mask: Path | None, units: str, strength: float | None
    ) -> dict[str, Any]:
        """Return what BIDS wants the sidecar of a map to say.

        Parameters
        ----------
        images, mask
            What it was made of.
        units
            Of the map.
        strength
            The strength of B0 [T], where it is known.
        """
        paths = [image.path for image in images] + ([] if mask is None else [mask])
        inside = [p.relative_to(self.dataset).as_posix() for p in paths]
        stated = {} if strength is None else {"MagneticFieldStrength": strength}
        return {
            "Description": DESCRIPTIONS[self.gives],
            "Units": units,
            "SkullStripped": True,  # it is zero outside the mask
            "GeneratedBy": [{"Name": NAME, "Version": version()}],
            "Sources": [f"bids:{SOURCE}:{name}" for name in inside],
            **stated,
        }


@contextlib.contextmanager
def claim(chi: Path, *, wait: bool) -> Iterator[bool]:
    """Make the folder of a map, and keep other processes from that map until the body ends.

    Parameters
    ----------
    chi
        The map.
    wait
        Whether to wait while another process makes it.

    Yields
    ------
    bool
        Whether the map is this process's to make.

    Raises
    ------
    DataError
        If the folder cannot be made, or nothing created in it.
    """
    name = f"{PREFIX}{chi.name.partition('.')[0]}"
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, chi.parent)  # last of all
        taken = False
        while not taken:
            make_folder(chi.parent)
            try:
                descriptor = stack.enter_context(held(chi.with_name(name), wait=wait))
                taken = True
            except FileNotFoundError:  # another process that failed has removed the folder
                continue
            except OSError as error:
                raise DataError(
                    f"cannot write to {chi.parent}: {error.strerror}; choose another --output"
                ) from error
        yield descriptor is not None


def clear_claim(chi: Path) -> None:
    """Remove what a process left that was killed as it made a map."""
    clear_leftovers(chi.parent)
    _remove_empty(chi.parent)


def _remove_empty(folder: Path) -> None:
    """Remove a folder and those above it, as far up as nothing else is in them."""
    with contextlib.suppress(OSError):
        os.removedirs(folder)


def make_folder(folder: Path, flag: str = "--output") -> None:
    """Create a folder, which a flag names, and those above it.

    Raises
    ------
    DataError
        If that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot create {folder}: {error.strerror}; choose another {flag}"
        ) from error
