"""The model for Triton's Python backend: field and mask in, susceptibility out, as by qsm-run."""

import hashlib
import json
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

import qsm_deploy.runtime as qsm
from qsm_deploy.runtime.job.request import wants_from

# parameters that are said to each reconstruction; all others are said to open_model
WANTED = {
    *("patch", "overlap", "blend", "memory_limit"),
    *("data_consistency", "dc_iterations", "allow_geometry"),
}
MISREAD = (
    "{} did not arrive as it was sent: this Triton does not fit NumPy {}, in its environment; "
    "install 'numpy<2', or take Triton 24.11 or later"
)


class TritonPythonModel:
    """One instance, in a process of its own."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open what makes the map; Triton does not serve the model if that fails."""
        config = json.loads(args["model_config"])
        said = {n: _value(p["string_value"]) for n, p in config["parameters"].items()}
        folder = Path(args["model_repository"], args["model_version"])
        models = [_same(folder / name, digest) for name, digest in said.pop("models").items()]
        self.wanted = {name: said.pop(name) for name in WANTED & said.keys()}
        wants_from(**self.wanted)
        if args["model_instance_kind"] == "GPU":
            said["device"] = f"cuda:{args['model_instance_device_id']}"
        self.model = qsm.open_model(models or None, **{"device": "cpu", **said})
        self.field = config["input"][0]["name"]
        self.gives = [one["name"] for one in config["output"]]
        # Triton counts calls that were refused among the successful ones
        self.families = {
            name: pb_utils.MetricFamily(
                name=name, description=text, kind=pb_utils.MetricFamily.COUNTER
            )
            for name, text in (
                ("qsm_scans_total", "Reconstructions, by what became of them"),
                ("qsm_seconds_total", "Time that they took, of those that were made"),
                ("qsm_voxels_total", "Voxels of those that were made"),
            )
        }
        self.counters: dict[tuple[str, str], Any] = {}
        self.name = config["name"]
        pb_utils.Logger.log_info(
            f"{self.name}: {self.model.reconstructor.inversion.name}, qsm-deploy {qsm.__version__}"
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Reconstruct one scan after the other."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Let the counters go before what they belong to."""
        self.counters.clear()
        self.families.clear()

    def _answer(self, request: Any) -> Any:
        error = pb_utils.TritonError
        if request.is_cancelled():
            return self._refusal("cancelled", "cancelled before it began", error.CANCELLED)
        try:
            return self._reconstructed(request)
        except (qsm.UsageError, qsm.DataError) as reason:
            return self._refusal("refused", str(reason), error.INVALID_ARG)
        except (qsm.MemoryLimitError, MemoryError) as reason:
            return self._refusal("no memory", str(reason) or "out of memory", error.UNAVAILABLE)
        except qsm.QsmDeployError as reason:
            return self._refusal("failed", str(reason), error.INTERNAL)
        except Exception as reason:
            pb_utils.Logger.log_error(traceback.format_exc())
            return self._refusal("failed", f"{type(reason).__name__}: {reason}", error.INTERNAL)

    def _reconstructed(self, request: Any) -> Any:
        began = time.perf_counter()
        given = {tensor.name(): _array(tensor) for tensor in request.inputs()}
        field, mask = given.pop(self.field), given.pop("MASK")
        besides: dict[str, Any] = {
            name.lower(): array.item() if array.shape == (1,) else array
            for name, array in given.items()
        }
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", UserWarning)
            made = self.model.reconstruct(field, mask, **besides, **self.wanted)
        maps = made if isinstance(made, dict) else {self.gives[0].lower(): made}
        said = "\n".join(str(n.message) for n in notes if n.category is UserWarning)
        answers = {name.upper(): np.ascontiguousarray(volume) for name, volume in maps.items()}
        answers["NOTES"] = np.array([said.encode()], dtype=np.object_)
        self._count("qsm_scans_total", 1, "made")
        self._count("qsm_seconds_total", time.perf_counter() - began)
        self._count("qsm_voxels_total", mask.size)
        return pb_utils.InferenceResponse([pb_utils.Tensor(n, a) for n, a in answers.items()])

    def _refusal(self, outcome: str, reason: str, code: int) -> Any:
        self._count("qsm_scans_total", 1, outcome)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(reason, code))

    def _count(self, family: str, number: float, outcome: str = "") -> None:
        key = (family, outcome)
        if key not in self.counters:
            labels = {"model": self.name, **({"outcome": outcome} if outcome else {})}
            self.counters[key] = self.families[family].Metric(labels=labels)
        self.counters[key].increment(number)


def _array(tensor: Any) -> Any:
    """Return a tensor as an array, if Triton and NumPy agree on what that is.

    Up to release 24.10 Triton hands NumPy 2 the first value in place of all, in an array that looks
    right; DLPack does not go that way.
    """
    array = tensor.as_numpy()
    if array.flags.c_contiguous:
        sent = np.from_dlpack(tensor)
        if np.array_equal(array.view(np.uint8), sent.view(np.uint8)):
            return array
    raise qsm.EngineError(MISREAD.format(tensor.name(), np.__version__))


def _value(text: str) -> Any:
    """Return what a parameter says: a number, true or false, or words."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _same(path: Path, digest: str) -> Path:
    """Return a model's path if it is the file that was exported."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise qsm.EngineError(
            f"{path} has SHA-256 {found}, config.pbtxt says {digest}: the file was changed or "
            "copied in part; write the folder again with qsm-export --triton"
        )
    return path
