"""Graphs of networks that were traced before, by this run or an earlier one.

A trace costs seconds and depends on nothing but what makes up the key here: the code, the
libraries, and the network with its classes, constants, attributes and weights.
"""

import hashlib
import importlib.metadata
import io
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from qsm_deploy.export.graph import tracing

ROOT = Path(tracing.__file__).resolve().parents[2]
SOURCES = (*ROOT.glob("export/**/*.py"), *ROOT.glob("kernels/*.py"))
LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript")
Trace = Callable[..., onnx.ModelProto]


def keep_traces(folder: Path, trace: Trace = tracing.trace) -> Trace:
    """Return the tracer that keeps what it makes in a folder, where only this code's may stay."""
    versions = [importlib.metadata.version(name) for name in LIBRARIES]
    kept = folder / _digest(*(path.read_bytes() for path in sorted(SOURCES)), versions)
    for old in folder.iterdir():
        if old != kept:
            shutil.rmtree(old, ignore_errors=True)
    kept.mkdir(exist_ok=True)

    def trace_once(module: nn.Module, *rest: Any) -> onnx.ModelProto:
        try:
            path = kept / _digest(_pickled(module), *_surroundings(module), rest[1:])
        except (AttributeError, pickle.PicklingError):  # a class or function without a name
            return trace(module, *rest)
        if not path.exists():
            made = path.with_name(f"{path.name}.{os.getpid()}")
            made.write_bytes(trace(module, *rest).SerializeToString())
            made.replace(path)  # two workers may write the same
        return onnx.ModelProto.FromString(path.read_bytes())

    return trace_once


def _digest(*parts: object) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else repr(part).encode())
    return whole.hexdigest()


class _Pickler(pickle.Pickler):
    """Pickles tensors by value: PyTorch's own form holds addresses."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            array = obj.detach().numpy()
            return _digest, (str(obj.dtype), array.shape, array.tobytes())
        return NotImplemented


def _pickled(module: nn.Module) -> bytes:
    data = io.BytesIO()
    pickler = _Pickler(data)
    pickler.fast = True  # else equal strings that are two objects make another pickle
    pickler.dump(module)
    return data.getvalue()


def _surroundings(module: nn.Module) -> Iterator[Any]:
    """Yield the constants beside a network's classes, which tests change, and the tests' files."""
    for name in sorted({type(part).__module__ for part in module.modules()}):
        file = sys.modules[name]
        if name.startswith("qsm_deploy."):
            yield [
                (n, v) for n, v in vars(file).items() if isinstance(v, int | float | str | tuple)
            ]
        elif not name.startswith("torch.") and file.__file__:
            yield Path(file.__file__).read_bytes()
