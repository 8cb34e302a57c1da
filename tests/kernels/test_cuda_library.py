"""The CUDA library builds here, without a GPU; its header is C; its binding says what is wrong."""

import ctypes
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from qsm_deploy.kernels import cuda_abi, cuda_build
from qsm_deploy.kernels.cmake import find_tool
from qsm_deploy.kernels.cuda_build import LIBRARY_NAME, SOURCES, build_cuda_library
from qsm_deploy.kernels.cuda_library import (
    LIBRARY_VARIABLE,
    DipoleOperator,
    PatchBox,
    open_cuda_library,
)
from qsm_deploy.kernels.errors import EngineError, GeometryError, UsageError
from qsm_deploy.kernels.geometry import Geometry

HEADER = SOURCES / "csrc" / "qsm_cuda.h"
ARCHITECTURES = {80, 86, 89, 90, 100, 120}
PTX, MACHINE_CODE = 1, 2


def device_code(library: Path) -> set[tuple[int, int]]:
    """Return (kind, architecture) of every piece of device code in a library.

    A fat binary has a header of 16 bytes, then pieces with headers of their own: kind and
    version (2 bytes each), header size (4), body size (8), and the architecture at byte 28.
    """
    data = library.read_bytes()
    pieces = set()
    for found in re.finditer(re.escape(struct.pack("<IHH", 0xBA55ED50, 1, 16)), data):
        start = found.start() + 16
        (length,) = struct.unpack_from("<Q", data, found.start() + 8)
        end = start + length
        while start < end:
            kind, _, header, body = struct.unpack_from("<HHIQ", data, start)
            pieces.add((kind, struct.unpack_from("<I", data, start + 28)[0]))
            start += header + body
    return pieces


@pytest.mark.slow
def test_it_is_built_for_every_gpu_and_for_those_to_come(cuda_path):
    code = device_code(cuda_path)
    assert {arch for kind, arch in code if kind == MACHINE_CODE} == ARCHITECTURES
    assert {arch for kind, arch in code if kind == PTX} == {80}


@pytest.mark.slow
def test_it_needs_no_cuda_runtime_and_shows_its_own_functions_only(cuda_path):
    read = [shutil.which("nm") or "nm", "-D", "--defined-only", str(cuda_path)]
    lines = subprocess.run(read, capture_output=True, text=True, check=True).stdout.splitlines()
    functions = {line.split()[-1] for line in lines if " T " in line}
    assert functions == set(cuda_abi.SIGNATURES)


@pytest.mark.slow
def test_it_builds_from_wheels_alone(tmp_path, monkeypatch):
    wheels = cuda_build.wheel_toolkit()
    if not wheels or not (wheels / "bin" / "nvcc").exists():
        pytest.skip("no nvidia-cuda-nvcc wheel")
    monkeypatch.setenv("CUDACXX", str(wheels / "bin" / "nvcc"))
    library = build_cuda_library(tmp_path, architectures="90-real")
    assert device_code(library) == {(MACHINE_CODE, 90)}
    assert open_cuda_library(library).versions()["cufft"].startswith("12.")


LAYOUT = """
#include <stdio.h>
#include "qsm_cuda.h"
#define SHOW(type, field) printf(#type "." #field " %zu\\n", offsetof(type, field))
int main(void) {
    printf("abi %d\\n", QSM_CUDA_ABI_VERSION);
FIELDS
    return 0;
}
"""
STRUCTURES = {
    "qsm_cuda_dipole": cuda_abi.Dipole,
    "qsm_cuda_patch": cuda_abi.Patch,
    "qsm_cuda_tv": cuda_abi.TotalVariation,
    "qsm_cuda_versions": cuda_abi.Versions,
}


def test_the_header_is_c_and_ctypes_agrees_with_it(tmp_path):
    compiler = find_tool("gcc")
    if not compiler:
        pytest.skip("no C compiler")
    lines, expected = [], [f"abi {cuda_abi.ABI_VERSION}"]
    for name, structure in STRUCTURES.items():
        for field, *_ in structure._fields_:
            lines.append(f"    SHOW({name}, {field});")
            expected.append(f"{name}.{field} {getattr(structure, field).offset}")
        lines.append(f'    printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(structure)}")
    for enum, prefix in ((cuda_abi.Status, ""), (cuda_abi.Multiplier, "")):
        for member in enum:
            lines.append(f'    printf("{member.name} %d\\n", QSM_CUDA_{prefix}{member.name});')
            expected.append(f"{member.name} {member.value}")
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    source.write_text(LAYOUT.replace("FIELDS", "\n".join(lines)))
    strict = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror"]
    subprocess.run([compiler, *strict, f"-I{HEADER.parent}", "-o", program, source], check=True)
    shown = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == expected


@pytest.mark.slow
def test_without_a_driver_every_call_says_so(cuda_path, cuda_handle):
    if not cuda_handle.qsm_cuda_probe(None):
        pytest.skip("no GPU is missing here")
    library = open_cuda_library(cuda_path)
    assert re.fullmatch(r"\d+\.\d+", library.versions()["cuda_runtime"])
    for call in (
        library.require_gpu,
        lambda: library.dipole_workspace_bytes(DipoleOperator(Geometry((4, 5, 6)))),
        lambda: library.patch_gather(PatchBox((4, 4, 4), (0, 0, 0), (2, 2, 2)), 4096, 8192),
    ):
        with pytest.raises(EngineError, match=r"driver|GPU"):
            call()
    library.release_plans()


@pytest.mark.slow
def test_the_library_is_named_by_argument_or_environment(cuda_path, tmp_path, monkeypatch):
    monkeypatch.setenv(LIBRARY_VARIABLE, str(cuda_path))
    assert open_cuda_library().versions()["cuda_runtime"] != "none"
    absent = tmp_path / LIBRARY_NAME
    with pytest.raises(EngineError, match=r"no CUDA library at .*make cuda.*QSM_CUDA_LIBRARY"):
        open_cuda_library(absent)
    monkeypatch.delenv(LIBRARY_VARIABLE)
    monkeypatch.setattr("qsm_deploy.kernels.cuda_library.BUILD_FOLDER", tmp_path)
    with pytest.raises(EngineError, match=str(absent)):
        open_cuda_library()


def test_what_is_no_library_is_refused(tmp_path, compiler):
    text = tmp_path / "text.so"
    text.write_text("not a library")
    with pytest.raises(EngineError, match="cannot be loaded"):
        open_cuda_library(text)
    names = [name for name in cuda_abi.SIGNATURES if name != "qsm_cuda_abi_version"]
    body = "".join(f"int {name}(void) {{ return 0; }}\n" for name in names)
    for version, message in (
        ("", "not a libqsm_cuda.so of this version"),
        ("int qsm_cuda_abi_version(void) { return 99; }\n", "version 99 of the interface"),
    ):
        source, library = tmp_path / "other.c", tmp_path / f"other{len(version)}.so"
        source.write_text(body + version)
        command = [compiler, "-x", "c", "-shared", "-fPIC", "-o", library, source]
        subprocess.run(command, check=True)
        with pytest.raises(EngineError, match=message):
            open_cuda_library(library)


def test_statuses_become_errors(twin_device):
    library = twin_device.library
    geometry = Geometry((4, 4, 4))
    with pytest.raises(GeometryError, match="batch"):
        library.dipole_workspace_bytes(DipoleOperator(geometry, batch=0))
    with pytest.raises(UsageError, match="threshold"):
        library.dipole_workspace_bytes(DipoleOperator(geometry, "tkd", threshold=2))
    with pytest.raises(UsageError, match="unknown multiplier 'cube'"):
        library.dipole_workspace_bytes(DipoleOperator(geometry, "cube"))
    with pytest.raises(UsageError, match="null pointer"):
        library.dipole_apply(DipoleOperator(geometry), 0, 0, 0, 0)
    with pytest.raises(GeometryError, match="32 bits"):  # and not 4, as ctypes would have it
        library.patch_gather(PatchBox((2**32 + 4, 4, 4), (0, 0, 0), (2, 2, 2)), 4096, 8192)
    with pytest.raises(GeometryError, match="three integers"):
        library.patch_gather(PatchBox((4, 4), (0, 0, 0), (2, 2, 2)), 4096, 8192)


def test_a_failed_build_shows_the_compiler_s_words(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDACXX", "/bin/false")
    with pytest.raises(EngineError, match=r"building libqsm_cuda.so failed(.|\n)*CUDA"):
        build_cuda_library(tmp_path)
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    with pytest.raises(EngineError, match="nvcc was not found; install"):
        build_cuda_library(tmp_path)


def test_importing_the_binding_loads_nothing(tmp_path):
    code = "import sys, qsm_deploy.kernels.cuda_library; print('torch' in sys.modules)\n" + (
        "print('qsm_cuda' in open('/proc/self/maps').read())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert run.stdout.split() == ["False", "False"]
