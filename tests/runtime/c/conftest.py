"""The C library as built, with OpenVINO and with a fake engine in its place, and its callers."""

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qsm_deploy.kernels.cmake import find_tool
from qsm_deploy.kernels.cuda_build import SOURCES as KERNELS
from qsm_deploy.runtime.c.build import LIBRARY_NAME, SOURCES, build_c_library
from qsm_deploy.runtime.card.card import (
    METADATA_KEY,
    GeometryLimits,
    MemoryUse,
    ModelCard,
    ReceptiveField,
    Tiles,
)
from qsm_deploy.runtime.card.plan_file import plan_bytes
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL

HERE = Path(__file__).parent
FAKE = HERE / "fake_engine.cpp"  # takes the place of these
REPLACED = {f"{n}.cpp.o" for n in ("session_openvino", "session_no_tensorrt")}
X_FASTEST, Z_FASTEST = 0, 1
PROGRESS = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)
CANCEL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
DRIVER = "libcuda.so.1"
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_char_p, ctypes.c_void_p)


class CScan(ctypes.Structure):
    _fields_ = (
        ("local_field_ppm", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("shape", ctypes.c_int32 * 3),
        ("voxel_size_mm", ctypes.c_double * 3),
        ("b0_direction", ctypes.c_double * 3),
    )


class CFacts(ctypes.Structure):
    _fields_ = (
        ("sigma_ppm", ctypes.c_double),
        ("alpha_ppm_mm", ctypes.c_double),
        ("last_change", ctypes.c_double),
        ("iterations", ctypes.c_int32),
    )


class CParams(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("threads", ctypes.c_int32),
        ("memory_order", ctypes.c_int32),
        ("axes", ctypes.c_char * 4),
        ("patch", ctypes.c_int32),
        ("overlap", ctypes.c_int32),
        ("blend", ctypes.c_int32),
        ("allow_geometry", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("memory_limit_bytes", ctypes.c_uint64),
        ("data_consistency_lambda", ctypes.c_double),
        ("data_consistency_iterations", ctypes.c_int32),
        ("alpha_ppm_mm", ctypes.c_double),
        ("iterations", ctypes.c_int32),
        ("threshold", ctypes.c_double),
        ("facts", ctypes.POINTER(CFacts)),
        ("progress", PROGRESS),
        ("cancel", CANCEL),
        ("log", LOG),
        ("user_data", ctypes.c_void_p),
    )


class CallError(Exception):
    """A status other than QSM_OK, and the library's line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Library:
    """The C functions, with numpy arrays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        self.c.qsm_version.restype = ctypes.c_char_p
        self.c.qsm_last_error.restype = ctypes.c_char_p
        self.c.qsm_default_params.restype = CParams
        self.c.qsm_engine_card.restype = ctypes.c_char_p
        self.c.qsm_engine_card.argtypes = (ctypes.c_void_p,)
        self.c.qsm_engine_close.argtypes = (ctypes.c_void_p,)

    def params(self, **values: Any) -> CParams:
        params: CParams = self.c.qsm_default_params()
        for name, value in values.items():
            setattr(params, name, value)
        return params

    def check(self, status: int) -> None:
        if status:
            raise CallError(status, self.c.qsm_last_error().decode())

    def open(self, path: Path | str, **values: Any) -> "Engine":
        return self._opened(self.c.qsm_engine_open, str(path), values)

    def open_method(self, method: str, **values: Any) -> "Engine":
        return self._opened(self.c.qsm_engine_open_method, method, values)

    def _opened(self, function: Any, name: str, values: dict[str, Any]) -> "Engine":
        handle, params = ctypes.c_void_p(), self.params(**values)
        self.check(function(name.encode(), ctypes.byref(params), ctypes.byref(handle)))
        return Engine(self, handle)


class Engine:
    """An open engine."""

    def __init__(self, library: Library, handle: ctypes.c_void_p) -> None:
        self.library, self.handle = library, handle

    def close(self) -> None:
        self.library.c.qsm_engine_close(self.handle)

    @property
    def card(self) -> str | None:
        card = self.library.c.qsm_engine_card(self.handle)
        return None if card is None else card.decode()

    def reconstruct(
        self,
        field: np.ndarray,
        mask: np.ndarray,
        voxel_size_mm: Sequence[float] = (1, 1, 1),
        b0_direction: Sequence[float] = (0, 0, 1),
        *,
        memory_order: int = Z_FASTEST,
        **values: Any,
    ) -> np.ndarray:
        order = "F" if memory_order == X_FASTEST else "C"
        field, mask = np.asarray(field, np.float32, order), np.asarray(mask, np.uint8, order)
        chi = np.full(field.shape, np.nan, np.float32, order)
        params = self.library.params(memory_order=memory_order, **values)
        scan = CScan(
            field.ctypes.data,
            mask.ctypes.data,
            (ctypes.c_int32 * 3)(*field.shape),
            (ctypes.c_double * 3)(*voxel_size_mm),
            (ctypes.c_double * 3)(*b0_direction),
        )
        self.library.check(
            self.library.c.qsm_reconstruct(
                self.handle,
                ctypes.byref(scan),
                ctypes.byref(params),
                ctypes.c_void_p(chi.ctypes.data),
            )
        )
        return chi


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """Return what runs a program that must succeed, and returns what it prints."""

    def run(*command: object, **options: Any) -> str:
        words = [str(word) for word in command]
        result = subprocess.run(words, capture_output=True, text=True, **options)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="session")
def cmake() -> None:
    if not find_tool("cmake"):
        pytest.skip("no CMake")


@pytest.fixture(scope="session")
def library(cmake: None, compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Return the library with OpenVINO, hardly optimised: that halves what its build takes."""
    folder = tmp_path_factory.mktemp("c")
    return Library(build_c_library(folder, options=debug("-O1", "-Werror")))


@pytest.fixture
def open_engine(library: Library) -> Iterator[Callable[..., Engine]]:
    """Return what opens a model, and close it afterwards."""
    engines = []

    def opened(path: Path | str, **values: Any) -> Engine:
        engines.append(library.open(path, **values))
        return engines[-1]

    yield opened
    for engine in engines:
        engine.close()


@pytest.fixture
def open_method(library: Library) -> Iterator[Callable[..., Engine]]:
    """Return what opens a method, and close it afterwards."""
    engines = []

    def opened(method: str, **values: Any) -> Engine:
        engines.append(library.open_method(method, **values))
        return engines[-1]

    yield opened
    for engine in engines:
        engine.close()


@pytest.fixture
def facts() -> CFacts:
    return CFacts()


def debug(*flags: str) -> list[str]:
    """Return the options of CMake for a build with these flags and no others."""
    return ["-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_CXX_FLAGS_DEBUG={' '.join(flags)}"]


@pytest.fixture(scope="session")
def build_driver(compiler: str, run: Callable[..., str]) -> Callable[..., Path]:
    """Return what builds a program that calls a library with the fake engine, beside it."""

    def build(library: Path, *flags: str, source: str = "driver.cpp") -> Path:
        folder = library.parent
        driver = folder / Path(source).stem
        run(
            *(compiler, "-std=c++17", "-Wall", "-Wextra", *flags),
            *(f"-I{SOURCES}", HERE / source, "-o", driver, library),
            *(f"-Wl,-rpath,{folder}", "-pthread", "-ldl"),
        )
        run(compiler, "-x", "c", "-shared", "-fPIC", HERE / "fake_driver.c", "-o", folder / DRIVER)
        return driver

    return build


@pytest.fixture(scope="session")
def build_fake(
    cmake: None,
    build_driver: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """Return what builds the library anew, with the fake engine, and a program that calls it."""

    def build(sanitize: str = "", *more: str, source: str = "driver.cpp") -> Path:
        flags = ["-O0", "-g1", "-Werror"]
        options = [f"-DQSM_FAKE_ENGINE={FAKE}", f"-DQSM_SANITIZE={sanitize}", *debug(*flags)]
        library = build_c_library(tmp_path_factory.mktemp("fake"), options=[*options, *more])
        flags += [f"-fsanitize={sanitize}"] if sanitize else []
        return build_driver(library, *flags, source=source)

    return build


@pytest.fixture(scope="session")
def libfuzzer(
    compiler: str, run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return libFuzzer with the library in it, that with the fake engine."""
    clang, folder = find_tool("clang++"), tmp_path_factory.mktemp("libfuzzer")
    if not clang:
        pytest.skip("no clang")
    sources = (path for path in SOURCES.glob("*.cpp") if not path.stem.startswith("session_"))
    defined = ("QSM_LIBFUZZER", "FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION")
    run(
        *(clang, "-std=c++17", "-O1", "-g1", "-fsanitize=fuzzer,address,undefined"),
        *("-fno-sanitize-recover=all", "-fno-omit-frame-pointer", *(f"-D{d}" for d in defined)),
        *('-DQSM_RUNTIME_VERSION="fuzz"', f"-I{SOURCES}", f"-I{KERNELS / 'csrc'}"),
        *(*sources, FAKE, HERE / "fuzz.cpp", "-o", folder / "fuzz", "-pthread", "-ldl"),
    )
    run(compiler, "-x", "c", "-shared", "-fPIC", HERE / "fake_driver.c", "-o", folder / DRIVER)
    return folder / "fuzz"


@pytest.fixture
def drive(run: Callable[..., str], twin_handle: ctypes.CDLL) -> Callable[..., str]:
    """Return what runs the driver, with a GPU that is none."""

    def drive(driver: Path, *arguments: str, before: Sequence[str] = ()) -> str:
        libraries = {
            "LD_LIBRARY_PATH": str(driver.parent),
            "QSM_CUDA_LIBRARY": str(twin_handle._name),
        }
        return run(*before, driver, *arguments, env=os.environ | libraries)

    return drive


@pytest.fixture(scope="session")
def plain_driver(
    library: Library,
    compiler: str,
    run: Callable[..., str],
    build_driver: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return the driver without sanitizers; the library lies beside it.

    It is of the same objects as that with OpenVINO, the fake engine in place of its own.
    """
    objects = library.path.parent.glob("CMakeFiles/qsm_runtime.dir/*.o")
    shared = (path for path in objects if path.name not in REPLACED)
    made = tmp_path_factory.mktemp("fake") / LIBRARY_NAME
    run(
        *(compiler, "-std=c++17", "-O0", "-g1", "-Werror", "-shared", "-fPIC"),
        *(
            f"-I{SOURCES}",
            f"-I{KERNELS / 'csrc'}",
            FAKE,
            *shared,
        ),
        *("-o", made, f"-Wl,-soname,{made.name},--no-undefined", "-pthread", "-ldl"),
    )
    return build_driver(made)


@pytest.fixture(scope="session")
def fake(plain_driver: Path) -> Library:
    """Return the library with the fake engine."""
    return Library(plain_driver.with_name(LIBRARY_NAME))


@pytest.fixture
def collect() -> Callable[[list[str]], Any]:
    """Return what makes a log callback that appends to a list."""

    def collect(lines: list[str]) -> Any:
        return LOG(lambda level, line, data: lines.append(line.decode()))

    return collect


@pytest.fixture
def progress() -> Callable[..., Any]:
    """Return what makes a progress callback."""
    return lambda body: PROGRESS(lambda done, total, data: body(done, total))


@pytest.fixture
def cancel() -> Callable[..., Any]:
    """Return what makes a cancel callback."""
    return lambda body: CANCEL(lambda data: int(body()))


@pytest.fixture
def call_error() -> type[CallError]:
    return CallError


@pytest.fixture(scope="session")
def prior_card() -> ModelCard:
    """Return the card of a network that takes what the bundled one does, made in few steps."""
    bundled = load_card(BUNDLED_MODEL)
    return replace(
        bundled,
        network="priors",
        anchor=None,
        priors=tuple(replace(prior, steps=min(prior.steps, 2)) for prior in bundled.priors),
        receptive_field=ReceptiveField(1, 1, 1.0),
        memory={"openvino": MemoryUse(0, 1)},
    )


@pytest.fixture(scope="session")
def prior_model(prior_card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model of that card: one convolution, in which all inputs count alike."""
    inputs = [
        helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.shape)
        for tensor in prior_card.inputs
    ]
    output = helper.make_tensor_value_info("chi_ppm", TensorProto.FLOAT, prior_card.output.shape)
    *volumes, mask, noise = [tensor.name for tensor in prior_card.inputs]
    shape = (1, len(volumes) + 1, 3, 3, 3)
    weights = np.random.default_rng(5).normal(0, 0.1, shape).astype(np.float32)
    nodes = [
        helper.make_node("Mul", [mask, noise], ["trust"]),
        helper.make_node("Concat", [*volumes, "trust"], ["all"], axis=1),
        helper.make_node("Conv", ["all", "weights"], ["chi_ppm"], pads=[1] * 6),
    ]
    constants = [onnx.numpy_helper.from_array(weights, "weights")]
    graph = helper.make_graph(nodes, "priors", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: prior_card.to_json()})
    path = tmp_path_factory.mktemp("priors") / "priors.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture
def fake_models(
    card: ModelCard, tkd_card: ModelCard, prior_card: ModelCard, tmp_path: Path
) -> Path:
    """Return a folder of models for the fake engine: cards in files, and plans made of two."""

    def constants(radius: float) -> ModelCard:
        return replace(card, constants={"mask_erosion_voxels": radius})

    cards = {
        "cnn": card,
        "tkd": tkd_card,
        "priors": prior_card,
        "fail": replace(card, options={"fake": "fail"}),
        "throw": replace(card, options={"fake": "throw"}),
        "memory": replace(card, options={"fake": "no memory"}),
        "small": replace(card, divisor=2, options={"fake": "small"}),
        "nan": replace(card, options={"fake": "nan"}),
        "eroded": constants(1.0),
        "lps": replace(card, axes="LPS"),
        "total": replace(
            card,
            task="total_field->chi",
            inputs=(replace(card.inputs[0], name="total_field_ppm"),),
            constants={"field_sign": -1.0},
            pad_front="floor",
        ),
        "tiles": replace(
            card,
            tiles=Tiles((8,) * 3, (8,) * 3, (3,) * 3, "zero", "mean"),
            patchable="no",
            why_whole="so it is",
        ),
        "erodes-all": constants(4096.0),
        "axial": replace(card, geometry=GeometryLimits((1.0,) * 3, 0.05, (0.0, 0.0, 1.0), 5.0)),
    }
    for name, made in cards.items():
        for suffix in (".onnx", ".plan"):
            (tmp_path / name).with_suffix(suffix).write_text(made.to_json())
    engine = replace(card, options={"plan": "1"}).to_json().encode()
    graph = card.to_json().encode()
    (tmp_path / "both.plan").write_bytes(plan_bytes(engine, graph))
    (tmp_path / "unfit.plan").write_bytes(plan_bytes(b"other" + engine, graph))
    (tmp_path / "unfit-alone.plan").write_bytes(b"other" + graph)
    return tmp_path
