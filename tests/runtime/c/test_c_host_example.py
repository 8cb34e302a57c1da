"""The header by itself, and the example that a C host begins with."""

import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsm_deploy.kernels.cmake import find_tool
from qsm_deploy.runtime.c.build import SOURCES
from qsm_deploy.runtime.card.plan_file import plan_bytes
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.console.provenance import version
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL

EXAMPLE = Path(__file__).parents[3] / "examples" / "c_host" / "main.c"
STRICT = ("-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{SOURCES}")


@pytest.fixture(scope="module")
def c_compiler() -> str:
    found = find_tool("gcc")
    if not found:
        pytest.skip("no C compiler")
    return str(found)


@pytest.fixture(scope="module")
def host(c_compiler: str, library: Any, run: Callable[..., str], tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("host") / "c_host"
    folder = library.path.parent
    link = (f"-L{folder}", "-lqsm_runtime", f"-Wl,-rpath,{folder}", "-lm")
    run(c_compiler, "-std=c99", *STRICT, EXAMPLE, *link, "-o", path)
    return path


@pytest.mark.parametrize("language", ["c -std=c99", "c -std=c17", "c++ -std=c++17"])
def test_the_header_is_complete(
    c_compiler: str, run: Callable[..., str], tmp_path: Path, language: str
) -> None:
    source = tmp_path / "header.c"
    source.write_text(
        '#include "qsm_runtime.h"\n#include "qsm_runtime.h"\n'
        "int main(void) { qsm_params params = qsm_default_params(); return params.threads; }\n"
    )
    run(c_compiler, "-x", *language.split(), *STRICT, "-fsyntax-only", source)


def test_the_example_in_the_header_compiles(
    c_compiler: str, run: Callable[..., str], tmp_path: Path
) -> None:
    lines = re.findall(r"^ \*     (.*)$", (SOURCES / "qsm_runtime.h").read_text(), re.M)
    assert len(lines) >= 15
    source = tmp_path / "usage.c"
    source.write_text(
        '#include <stdio.h>\n#include "qsm_runtime.h"\n'
        "int use(const float *field, const uint8_t *mask, float *chi_ppm,\n"
        "        int (*stop_button_pressed)(void *));\n"
        "int use(const float *field, const uint8_t *mask, float *chi_ppm,\n"
        "        int (*stop_button_pressed)(void *)) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    )
    run(c_compiler, "-std=c99", *STRICT, "-fsyntax-only", source)


def test_the_example_in_the_documentation_compiles(
    c_compiler: str, run: Callable[..., str], tmp_path: Path
) -> None:
    page = (SOURCES.parents[1] / "docs" / "c-abi.md").read_text()
    (lines,) = re.findall(r"^```c\n(.*?)^```", page, re.M | re.S)
    declared = "void use(const qsm_scan *scan, float *chi_ppm, int (*stop_button_pressed)(void *))"
    source = tmp_path / "usage.c"
    source.write_text(
        f'#include <stdio.h>\n#include "qsm_runtime.h"\n{declared};\n{declared} {{\n{lines}}}\n'
    )
    run(c_compiler, "-std=c99", *STRICT, "-fsyntax-only", source)


def test_the_library_has_the_version_of_the_package(library: Any) -> None:
    assert library.c.qsm_version().decode() == version()


def test_the_library_shows_its_functions_only(library: Any, run: Callable[..., str]) -> None:
    nm = find_tool("nm")
    if not nm:
        pytest.skip("no nm")
    shown = run(nm, "-D", "--defined-only", library.path).split()[2::3]
    declared = re.findall(r"\b(qsm_\w+)\(", (SOURCES / "qsm_runtime.h").read_text())
    assert set(shown) <= set(declared)
    assert {
        "qsm_engine_open",
        "qsm_engine_open_method",
        "qsm_reconstruct",
        "qsm_reconstruct_device",
    } <= set(shown)


@pytest.mark.parametrize("model", [BUNDLED_MODEL, "tv"])
def test_the_example_finds_the_sphere(host: Path, run: Callable[..., str], model: Any) -> None:
    found = re.search(r"difference ([\d.]+) ppm of 0.1000", run(host, model))
    assert found
    assert float(found[1]) == pytest.approx(0.1, rel=0.1)


def test_the_example_reads_and_writes_raw_volumes(
    host: Path, run: Callable[..., str], open_engine: Callable[..., Any], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((20, 24, 16), np.uint8)
    mask[2:-2, 3:-4, 1:-1] = 1
    field = rng.normal(0, 0.03, mask.shape).astype(np.float32)
    (tmp_path / "field").write_bytes(field.tobytes("F"))
    (tmp_path / "mask").write_bytes(mask.tobytes("F"))
    grid = ["20", "24", "16", "1", "1", "2", "0", "0.5", "1"]
    files = ("field", "mask", "chi")
    run(host, BUNDLED_MODEL, *files, *grid, cwd=tmp_path)
    chi = np.fromfile(tmp_path / "chi", np.float32).reshape(mask.shape, order="F")
    expected = open_engine(BUNDLED_MODEL).reconstruct(field, mask, (1, 1, 2), (0, 0.5, 1))
    np.testing.assert_allclose(chi, expected, atol=1e-7)

    options = {"engine": "tensorrt 11.1.0", "plan": "1"}
    engine = replace(load_card(BUNDLED_MODEL), options=options).to_json().encode()
    (tmp_path / "x.plan").write_bytes(plan_bytes(engine, BUNDLED_MODEL.read_bytes()))
    run(host, "x.plan", "field", "mask", "from-plan", *grid, cwd=tmp_path)
    assert (tmp_path / "from-plan").read_bytes() == (tmp_path / "chi").read_bytes()

    short = subprocess.run(
        [host, BUNDLED_MODEL, *files, "21", *grid[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert short.returncode == 3
    assert "does not have 32256 bytes" in short.stderr


def test_the_example_can_be_stopped(host: Path, tmp_path: Path) -> None:
    shape = (160, 160, 160)
    field = np.random.default_rng(0).standard_normal(shape, np.float32)
    (0.03 * field).tofile(tmp_path / "field")
    np.ones(shape, np.uint8).tofile(tmp_path / "mask")
    grid = [*["160"] * 3, *["1"] * 3, "0", "0", "1"]
    words = [host, BUNDLED_MODEL, "field", "mask", "chi", *grid]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    while "predicted peak" not in process.stderr.readline():
        time.sleep(0)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "cancelled by the caller" in said
    assert not (tmp_path / "chi").exists()
