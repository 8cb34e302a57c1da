"""Plans through TensorRT's interfaces, with a made-up TensorRT and a made-up GPU."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qsm_deploy.kernels.cuda_build import find_nvcc, wheel_toolkit

HERE = Path(__file__).parent
INTERFACES = ("Runtime", "CudaEngine", "ExecutionContext")


def stubs(header: str) -> str:
    """Return classes that end the process in every function that a header leaves open."""
    made = ["#include <cstdlib>", "namespace nvinfer1 {"]
    for name in INTERFACES:
        body = re.search(rf"class V{name} : public VRoot\s*{{(.*?)\n}};", header, re.S)
        assert body, f"V{name}"
        made.append(f"class Stub{name} : public apiv::V{name} {{\n  public:")
        for function in re.findall(r"virtual\s+([^;]*?)\s*=\s*0;", body[1], re.S):
            made.append(f"    {' '.join(function.split())} override {{ std::abort(); }}")
        made.append("};")
    return "\n".join([*made, "}", ""])


@pytest.fixture(scope="module")
def includes(tensorrt_include: Path) -> list[str]:
    nvcc, wheels = find_nvcc(), wheel_toolkit()
    toolkits = [nvcc.resolve().parents[1]] if nvcc else []
    folders = [folder / "include" for folder in (*toolkits, wheels) if folder]
    found = [folder for folder in folders if (folder / "cuda_runtime_api.h").exists()]
    if not found:
        pytest.skip("no TensorRT: its headers need CUDA's")
    return [str(tensorrt_include), str(found[0])]


@pytest.fixture(scope="module")
def driver(
    build_fake: Callable[..., Path],
    compiler: str,
    includes: list[str],
    run: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return the driver with a library that opens plans in TensorRT."""
    program = build_fake(
        "address,undefined",
        f"-DQSM_TENSORRT_INCLUDE={includes[0]}",
        f"-DQSM_CUDA_INCLUDE={includes[1]}",
    )
    folder = tmp_path_factory.mktemp("stubs")
    header = Path(includes[0], "NvInferImpl.h").read_text()
    (folder / "tensorrt_stubs.h").write_text(stubs(header))
    version = Path(includes[0], "NvInferVersion.h").read_text()
    major = re.search(r"define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)", version)
    assert major
    run(
        *(compiler, "-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-Wall", "-Werror"),
        *(f"-isystem{include}" for include in includes),
        *(f"-I{folder}", HERE / "fake_tensorrt.cpp"),
        *("-o", program.parent / f"libnvinfer.so.{major[1]}"),
    )
    return program


def test_a_plan_gives_what_the_onnx_file_gives(
    driver: Path, drive: Callable[..., str], fake_models: Path
) -> None:
    drive(driver, str(fake_models))


def test_what_is_no_plan_is_refused(
    driver: Path, drive: Callable[..., str], fake_models: Path
) -> None:
    text = (fake_models / "cnn.onnx").read_text()
    plans = {
        "damaged": ("no plan", r"cannot load it; .*: not a plan, as the test wishes$"),
        "half": (text.replace('"twice"', '"half"'), "local_field_ppm is not float32"),
        "card": (text.replace('"divisor":4', '"divisor":0'), "contradictory card: divisor"),
    }
    paths: list[Any] = []
    for name, (content, _) in plans.items():
        paths.append(fake_models / f"refused-{name}.plan")
        paths[-1].write_text(content)
    said = drive(driver, str(fake_models), *map(str, paths)).splitlines()
    for (_, expected), line in zip(plans.values(), said, strict=True):
        assert re.search(expected, line), line
