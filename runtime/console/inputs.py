"""What a command line names as its input: that it is there, was downloaded, and is no weights."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from qsm_deploy.kernels.errors import DataError, UsageError

# of weights and, unlike .npz and .mat, of no volumes
WEIGHTS_SUFFIXES = (".pth", ".pt", ".ckpt", ".pkl", ".safetensors", ".h5", ".hdf5", ".keras")

ANNEX_POINTER = b"/annex/objects/"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = 512
A_FOLDER = "a folder; pass one file, a BIDS dataset with --bids, and a folder of DICOM with --dicom"


def not_downloaded(path: Path) -> str | None:
    """Return what stands in place of a file whose content was not fetched, and how to fetch it.

    ``None`` where there is content, or nothing at all.
    """
    try:
        if path.is_symlink() and not os.path.exists(path):
            target = os.readlink(path)
            if "annex" in target:
                return f"not downloaded, a link of git-annex to nothing; run: datalad get {path}"
            if _is_loop(path):
                return f"a link to {target}, which leads back to itself; make it again"
            return f"a link to {target}, which does not exist; fetch it, with DataLad: datalad get"
        if not path.is_file():
            return None
        with path.open("rb") as file:
            head = file.read(POINTER_BYTES)
    except OSError:
        return None
    if head.startswith((b"../", b"/")) and ANNEX_POINTER in head:
        return f"not downloaded, a pointer of git-annex; run: datalad get {path}"
    if head.startswith(LFS_POINTER):
        return "a Git LFS pointer in place of the file, not downloaded; run: git lfs pull"
    return None


def _is_loop(path: Path) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def require_files(paths: Iterable[Path | None], kind: str = "file") -> None:
    """Refuse inputs that are no regular files, before anything is said of the outputs.

    Pipes and devices, which may never end, are not opened.

    Raises
    ------
    DataError
        If one is missing, a folder, a pipe, a socket or a device, or was not downloaded.
    """
    for path in paths:
        if path is None:
            continue
        if left := not_downloaded(path):
            raise DataError(f"{path}: {left}")
        if os.path.isfile(path):  # which takes a name of any length
            continue
        if os.path.exists(path):
            other = A_FOLDER if os.path.isdir(path) else "no regular file; write it to one first"
            raise DataError(f"{path}: {other}")
        raise DataError(f"{path}: no such {kind}")


def require_no_pipe(path: Path) -> None:
    """Refuse what is there and no regular file; of what is not there its reader tells.

    Raises
    ------
    DataError
        As :func:`require_files`.
    """
    if os.path.lexists(path):
        require_files([path])


def refuse_weights(path: Path) -> None:
    """Refuse weights where a model or a field is needed, and say what to make of them.

    Raises
    ------
    UsageError
        If the name is that of weights.
    """
    if path.suffix.lower() in WEIGHTS_SUFFIXES:
        raise UsageError(
            f"{path} are weights; make a model of them with: qsm-export --model NAME "
            f"--weights {path} -o NAME.onnx"
        )
