"""What Triton gives a Python model, without Triton: as much as a model of ours uses."""

import importlib.util
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

FORMS = {"TYPE_FP32": np.float32, "TYPE_FP64": np.float64, "TYPE_UINT8": np.uint8}


class TritonError(Exception):
    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = range(4)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Tensor:
    """A tensor; one that is misread has its first value everywhere, as with NumPy 2."""

    _name: str
    array: np.ndarray
    misread: bool = False

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return np.full_like(self.array, self.array.flat[0]) if self.misread else self.array

    def __dlpack__(self, **how: Any) -> Any:
        return self.array.__dlpack__(**how)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    def get(self, name: str) -> np.ndarray:
        return next(t.array for t in self.output_tensors if t.name() == name)

    @property
    def notes(self) -> str:
        return self.get("NOTES")[0].decode()


@dataclass
class Request:
    tensors: list[Tensor]
    cancelled: bool = False

    def inputs(self) -> list[Tensor]:
        return self.tensors

    def is_cancelled(self) -> bool:
        return self.cancelled


class Served:
    """A model of a repository, as Triton would open and call it."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str = "CPU", **said: str
    ) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.config = read_config(folder / "config.pbtxt")
        self.config["parameters"] |= {n: {"string_value": text} for n, text in said.items()}
        stand_in: Any = ModuleType("triton_python_backend_utils")
        stand_in.TritonError, stand_in.Tensor = TritonError, Tensor
        stand_in.InferenceResponse = InferenceResponse
        stand_in.Logger = SimpleNamespace(log_info=print, log_error=print)
        stand_in.MetricFamily = self._family()
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
        spec = importlib.util.spec_from_file_location("served_model", folder / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.model = module.TritonPythonModel()
        self.model.initialize(
            {
                "model_config": json.dumps(self.config),
                "model_repository": str(folder),
                "model_version": "1",
                "model_instance_kind": kind,
                "model_instance_device_id": "1",
            }
        )

    def __call__(
        self, *, cancelled: bool = False, misread: str = "", **tensors: Any
    ) -> InferenceResponse:
        """Call it with tensors of the types that its configuration says, as Triton sees to it."""
        types = {one["name"]: FORMS[one["data_type"]] for one in self.config["input"]}
        given = [
            Tensor(n, a if isinstance(a, np.ndarray) else np.array(a, types[n]), n == misread)
            for n, a in tensors.items()
        ]
        assert all(tensor.array.dtype == types[tensor.name()] for tensor in given)
        [answer] = self.model.execute([Request(given, cancelled)])
        if answer.error is None:
            names = [one["name"] for one in self.config["output"]]
            assert [tensor.name() for tensor in answer.output_tensors] == names
            assert all(tensor.array.flags.c_contiguous for tensor in answer.output_tensors)
        return answer

    def _family(self) -> type:
        counts = self.counts

        class MetricFamily:
            COUNTER = 0

            def __init__(self, name: str, description: str, kind: int) -> None:
                self.name = name

            def Metric(self, labels: dict[str, str]) -> Any:
                key = (self.name, *labels.values())
                return SimpleNamespace(increment=lambda number: counts.update({key: number}))

        return MetricFamily


def read_config(path: Path) -> dict[str, Any]:
    """Return a configuration as Triton hands it on, of the lines that we write."""
    text = re.sub(r"^#.*$", "", path.read_text(), flags=re.M)
    tensor = re.compile(r'\{ name: "(\w+)" data_type: (\w+) dims: (\[.*?\])( optional: true)? \}')
    lists = {
        name: [
            {"name": n, "data_type": kind, "dims": json.loads(dims), "optional": bool(optional)}
            for n, kind, dims, optional in tensor.findall(
                text[text.index(f"\n{name} [") : text.index("\n]", text.index(f"\n{name} ["))]
            )
        ]
        for name in ("input", "output")
    }
    said = re.findall(r'parameters \{ key: "(\w+)" value \{ string_value: (".*") \} \}', text)
    kind = re.search(r"kind: (\w+)", text)
    name = re.search(r'^name: "(\w+)"', text, flags=re.M)
    assert kind is not None
    assert name is not None
    return {
        "name": name[1],
        **lists,
        "instance_group": [{"kind": kind[1]}],
        "parameters": {key: {"string_value": json.loads(value)} for key, value in said},
    }
