"""What a file is that holds no weights, told by its first bytes."""

import zlib
from pathlib import Path

from qsm_deploy.runtime.card.read import PLAN
from qsm_deploy.runtime.console.inputs import not_downloaded

HEAD_BYTES = 512
GZIP, ZIP, HDF5, PICKLE = b"\x1f\x8b", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"\x80"
WEB_PAGE = (b"<!doctype html", b"<html")
MATLAB = (b"MATLAB 5.0 MAT-file", b"MATLAB 7.3 MAT-file")
NIFTI_1, NIFTI_2 = (b"n+1\0", b"ni1\0"), (b"n+2\0", b"ni2\0")


def stand_in(path: Path) -> str | None:
    """Return what a download left in place of the file, and what to do, if it did."""
    if left := not_downloaded(path):
        return left
    head = _head(path)
    if head.lstrip().lower().startswith(WEB_PAGE):
        return "a web page in place of the file; download it again"
    return None


def other_kind(path: Path) -> str | None:
    """Return what a file is and what to do, if it is one that holds no weights by its kind."""
    if left := stand_in(path):
        return left
    head = _head(path)
    if path.suffix == PLAN:
        return "a plan for TensorRT, no weights; pass the weights that it was made from"
    if head.startswith(b"{"):
        return "JSON, no weights; pass the weights or the model that it lies beside"
    if head.startswith(MATLAB):
        return (
            "a MATLAB file, in which no network here has its weights; means and deviations go to "
            "--normalisation"
        )
    if head[128:132] == b"DICM":
        return "a DICOM image, no weights; convert it to NIfTI for qsm-run"
    volume = _unpacked(head) if head.startswith(GZIP) else head
    if volume[344:348] in NIFTI_1 or volume[4:8] in NIFTI_2:
        return "a NIfTI volume, no weights; qsm-run takes it as FIELD"
    if head.startswith(GZIP):
        return "compressed by gzip; unpack it with gunzip"
    return None


def no_pickle(path: Path) -> str:
    """Return what a file is that PyTorch could not read although it may hold weights."""
    head = _head(path)
    if head.startswith(ZIP) and b"data.pkl" not in path.read_bytes():
        return "a ZIP archive, not a PyTorch file; unpack it and pass a file in it"
    if head.startswith(HDF5):
        return "an HDF5 file, not a PyTorch file; name it .h5 if it is of Keras"
    if head and head.isascii() and head.decode().replace("\n", "").isprintable():
        return "text, not a PyTorch file; pass the weights that the authors publish"
    return "truncated, or not a PyTorch file"


def is_pickle(path: Path) -> bool:
    """Whether a file begins as PyTorch's do, older and newer ones."""
    return _head(path).startswith((PICKLE, ZIP))


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _unpacked(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""
