"""What a file is, told by its bytes: the format of the weights in it, or why it has none."""

import os
import re
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Literal

from qsm_deploy.kernels.errors import WeightsError
from qsm_deploy.runtime.card.read import PLAN
from qsm_deploy.runtime.console.inputs import not_downloaded

Format = Literal["pickle", "safetensors", "hdf5", "npz"]
# what torch, numpy and zipfile raise on damaged bytes, found by damaging them
DAMAGED = (
    *(ValueError, OSError, EOFError, LookupError, AssertionError, TypeError, AttributeError),
    *(RuntimeError, MemoryError, OverflowError, SyntaxError, struct.error, zlib.error),
    *(zipfile.BadZipFile, tokenize.TokenError),
)
HEAD_BYTES = 512
MOST_BYTES, MOST_TIMES = 2**30, 4  # what a file may unpack to, and that many times its own size
GZIP, ZIP = b"\x1f\x8b", (b"PK\x03\x04", b"PK\x05\x06")
WEB_PAGE = rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html|head|!--)"
FORMATS: dict[Format, bytes] = {
    "safetensors": rb".{5}\0{3}\{",
    "hdf5": rb"\x89HDF\r\n",
    "pickle": rb"\x80[\x02-\x05]",
}
SUFFIXES: dict[str, Format] = {
    ".safetensors": "safetensors",
    **dict.fromkeys((".h5", ".hdf5", ".keras"), "hdf5"),
    ".npz": "npz",
}
MADE_FROM = "pass the weights that it was made from"
TENSORFLOW = (
    "of TensorFlow; save its variables by name as docs/qsmnet-weights.md says (NeXtQSM's authors "
    "publish .weights.h5 files beside it: pass these)"
)
TENSORFLOW_SHARD = re.compile(r"\.data-\d{5}-of-\d{5}$")  # bare numbers: only the name tells
TENSORFLOW_INDEX = bytes.fromhex("57fb808b247547db")  # at the end
OTHERS = (
    (rb"\s*(\{|\[\s*[\[{\"\d-])", "JSON, no weights; pass the weights or the model it belongs to"),
    (rb"ftrt", f"a plan for TensorRT, no weights; {MADE_FROM}"),
    (rb"\x08\x01\x12", f"a SavedModel {TENSORFLOW}"),
    (rb"\n.{1,3}\n.[!-~]+\x12.[A-Z]\w+", f"a frozen graph {TENSORFLOW}"),
    (rb".{4}TFL3", f"a TensorFlow Lite model, no weights; {MADE_FROM}"),
    (rb"\x08[\x02-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]", f"an ONNX model, no weights; {MADE_FROM}"),
    (rb"\s*<\?xml", f"XML, no weights: a model of OpenVINO or a refused download; {MADE_FROM}"),
    (rb"\x93NUMPY", "one NumPy array without a name; pass all in an .npz, by numpy.savez"),
    (
        rb"MATLAB [57]\.\d MAT-file",
        "a MATLAB file, in which no network here has its weights; means and deviations go to "
        "--normalisation; of a DAGNetwork, as BFRnet's, pass what MATLAB writes by "
        "exportONNXNetwork(net,'BFRnet.onnx','OpsetVersion',13)",
    ),
    (rb".{128}DICM", "a DICOM image, no weights; convert it to NIfTI for qsm-run"),
    (rb".{344}n[+i]1\0|.{4}n[+i]2\0", "a NIfTI volume, no weights; qsm-run takes it as FIELD"),
    (rb".{257}ustar", "a tar archive; unpack it with tar -xf and pass the file of weights in it"),
    (rb"BZh", "compressed by bzip2; unpack it with bunzip2"),
    (rb"\xfd7zXZ", "compressed by xz; unpack it with unxz"),
    (rb"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it with unzstd"),
    (rb"7z\xbc\xaf|Rar!", "an archive; unpack it and pass the file of weights in it"),
)
# what PyTorch writes besides state dicts, by the names in it
ZIP_OTHERS = (
    (
        r"(^|/)constants\.pkl$",
        "a TorchScript archive, code with weights; save these with: "
        "torch.save(torch.jit.load({path!r}).state_dict(), 'weights.pth')",
    ),
    (
        r"(^|/)archive_format$",
        "an archive of torch.export, a graph with weights; save these with: "
        "torch.save(torch.export.load({path!r}).state_dict, 'weights.pth')",
    ),
    (r"^model\.weights\.h5$", "an archive of Keras; save the weights by save_weights as .h5"),
)


def stand_in(path: Path) -> str | None:
    """Return what a download left in place of the file, and what to do, if it did."""
    if left := not_downloaded(path):
        return left
    if re.match(WEB_PAGE, _head(path)):
        return "a web page in place of the file; download it again"
    return None


def weights_format(path: Path) -> Format:
    """Return the format that a file's bytes are in; where they do not tell, that of its name.

    Raises
    ------
    WeightsError
        If it holds no weights by its kind, or is a ZIP archive that is damaged; the message says
        what it is and what to do.
    """
    head = _head(path)
    if head.startswith(ZIP):
        return _zip_format(path)
    for name, pattern in FORMATS.items():
        if re.match(pattern, head, re.DOTALL):
            return name
    if kind := stand_in(path) or _other_kind(path, head):
        raise WeightsError(f"{path}: {kind}")
    return SUFFIXES.get(path.suffix.lower(), "pickle")


def refuse_inflated(path: Path, size_bytes: int) -> None:
    """Refuse a file that holds far more than its own size, before that is in memory.

    Raises
    ------
    WeightsError
        If its values take over 1 GiB, and over four times as much as the file.
    """
    if size_bytes > max(MOST_BYTES, MOST_TIMES * path.stat().st_size):
        raise WeightsError(
            f"{path}: {path.stat().st_size / 1e6:.3g} MB that unpack to {size_bytes / 1e9:.3g} GB, "
            "which no weights do; get the file again"
        )


def no_pickle(path: Path) -> str:
    """Return what a file is that PyTorch could not read although it may hold weights."""
    head = _head(path)
    if head and head.isascii() and head.decode().replace("\n", "").isprintable():
        return "text, not a PyTorch file; pass the weights that the authors publish"
    return "truncated, or not a PyTorch file"


def refused_pickle(path: Path, error: str) -> str:
    """Return what a file is that PyTorch refused to unpickle with that error."""
    if not _head(path).startswith((b"\x80", *ZIP)):
        return no_pickle(path)
    asked = re.search(r"GLOBAL (\S+)", error)
    if asked is None:
        return (
            "a pickle of another protocol than 2, or damaged, refused without running it; "
            "save it again by torch.save"
        )
    if b"_parameters" in path.read_bytes():
        return (
            "a whole pickled nn.Module, refused without running it; where you trust it, save its "
            f"weights with: torch.save(torch.load({str(path)!r}, weights_only=False).state_dict(), "
            "'weights.pth')"
        )
    return (
        f"a pickle with more than tensors in it ({asked[1]}), refused without running it; "
        "save model.state_dict()"
    )


def _other_kind(path: Path, head: bytes) -> str | None:
    if path.suffix == PLAN:
        return f"a plan for TensorRT, no weights; {MADE_FROM}"
    if TENSORFLOW_SHARD.search(path.name) or _tail(path) == TENSORFLOW_INDEX:
        return f"a part of a checkpoint {TENSORFLOW}"
    content = _unpacked(head) if head.startswith(GZIP) else head
    for pattern, words in OTHERS:
        if re.match(pattern, content, re.DOTALL):
            return words
    return "compressed by gzip; unpack it with gunzip" if head.startswith(GZIP) else None


def _zip_format(path: Path) -> Format:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            refuse_inflated(path, sum(entry.file_size for entry in entries))
            # torch does not look at the checksums; all are 0 where it was told to write none
            wrong = archive.testzip() if any(entry.CRC for entry in entries) else None
    except DAMAGED as error:
        raise WeightsError(
            f"{path}: a ZIP archive, truncated or damaged; get the file again"
        ) from error
    if wrong is not None:
        raise WeightsError(f"{path}: damaged, {wrong!r} in it has another checksum; get it again")
    names = [entry.filename for entry in entries]
    for pattern, words in ZIP_OTHERS:
        if any(re.search(pattern, name) for name in names):
            raise WeightsError(f"{path}: {words.format(path=str(path))}")
    if any(name.endswith("data.pkl") for name in names):
        return "pickle"
    if all(name.endswith(".npy") for name in names):
        return "npz"
    raise WeightsError(
        f"{path}: a ZIP archive of {names[0]!r} and others, not a PyTorch file; unpack it and "
        "pass a file in it"
    )


def require_weights_file(path: Path, hint: str) -> None:
    """Refuse what is no regular file or was not downloaded, and say what to do.

    Raises
    ------
    WeightsError
        If it is none.
    """
    if left := not_downloaded(path):
        raise WeightsError(f"{path}: {left}")
    if not os.path.isfile(path):
        seen = "no regular file" if os.path.exists(path) else "no such file"
        raise WeightsError(f"{path}: {seen}; {hint}")


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(TENSORFLOW_INDEX)))
        return file.read()


def _unpacked(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""
