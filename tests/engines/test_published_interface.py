"""Every use of TensorRT, and the stand-in for it, held against the bindings that NVIDIA publishes.

mypy writes stubs of the compiled bindings and checks our files with them. The bindings of the full
TensorRT come without the libraries that they call, which no package index has: empty ones do for
looking. For other versions unpack a wheel of ``tensorrt_cu12_bindings`` or
``tensorrt_cu13_bindings`` and name its folder in ``$QSM_TENSORRT_BINDINGS``.
"""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKED = (
    *(
        "runtime.gpu.engines.tensorrt_library",
        "runtime.gpu.engines.tensorrt",
        "runtime.gpu.building.builder",
    ),
    *("runtime.gpu.building.config", "runtime.gpu.building.layers"),
    *("runtime.gpu.building.build_progress", "runtime.gpu.building.timing_cache"),
)
# what the bindings have and mypy cannot see: the buffer of a block of memory, and that the alias
# of a data type is not Python's own
MEMORY = "class IHostMemory:\n"
BUFFER = "    def __buffer__(self, flags: int, /) -> memoryview: ...\n"
UNREADABLE = re.compile(r"^bool: .*\n|^ *def add_scale_nd.*\n", re.MULTILINE)
# what must be found, or nothing was looked at
MISUSE = """
from qsm_deploy.runtime.gpu.engines.tensorrt_library import Library
def misuse(library: Library) -> None:
    library.Runtime.deserialise_cuda_engine
    library.BuilderFlag.TF33
"""
NEEDS = re.compile(r"\(NEEDED\).*\[(libnv[\w.]+)\]")
CALLS = re.compile(r" U (create\w+|get\w*Registry|getNv\w+|initLib\w+)$", re.MULTILINE)


def bindings_of_tensorrt() -> Path | None:
    """Return the folder that holds the package ``tensorrt_bindings``."""
    if named := os.environ.get("QSM_TENSORRT_BINDINGS"):
        return Path(named)
    found = importlib.util.find_spec("tensorrt_bindings")
    return Path(found.origin).parents[1] if found and found.origin else None


@pytest.fixture(scope="module")
def empty_libraries(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment in which the bindings of TensorRT load, and call into nothing."""
    folder = bindings_of_tensorrt()
    if folder is None:
        pytest.skip("no TensorRT bindings: install tensorrt_cu13_bindings")
    binding = next((folder / "tensorrt_bindings").glob("tensorrt*.so"))
    libraries = tmp_path_factory.mktemp("empty")
    needed, undefined = (
        subprocess.run([*command, binding], capture_output=True, text=True, check=True).stdout
        for command in (("readelf", "-d"), ("nm", "-D", "--undefined-only"))
    )
    calls = "".join(f"void* {name}(void) {{ return 0; }}\n" for name in CALLS.findall(undefined))
    (libraries / "empty.c").write_text(calls)
    for name in NEEDS.findall(needed):
        flags = ["-shared", "-fPIC", "-x", "c", "empty.c", f"-Wl,-soname,{name}", "-o", name]
        subprocess.run([compiler, *flags], check=True, cwd=libraries)
    return {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt_rtx"])
def flavour(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def stubs(
    flavour: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a folder with the stubs of a flavour under the name ``tensorrt``."""
    if flavour == "tensorrt":
        environment = request.getfixturevalue("empty_libraries")
    else:
        pytest.importorskip(flavour, reason="no TensorRT-RTX")
        environment = dict(os.environ)
    folder = tmp_path_factory.mktemp("stubs")
    write = "from mypy.stubgen import main; main()"
    arguments = ["-q", "-m", f"{flavour}_bindings.{flavour}", "-o", str(folder / "made")]
    run = subprocess.run(
        [sys.executable, "-c", write, *arguments], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    made = (folder / "made" / f"{flavour}_bindings" / f"{flavour}.pyi").read_text()
    text = UNREADABLE.sub("", made).replace(MEMORY, MEMORY + BUFFER)
    package = folder / "tensorrt"
    package.mkdir()
    (package / "__init__.pyi").write_text(f"{text}\n__version__: str\n")
    return folder


@pytest.mark.slow
def test_every_use_is_in_the_published_interface(stubs: Path, tmp_path: Path) -> None:
    (tmp_path / "misuse.py").write_text(MISUSE)
    modules = [word for name in CHECKED for word in ("-m", f"qsm_deploy.{name}")]
    cache = ROOT / ".mypy_cache" / "tensorrt"
    options = ["--cache-dir", str(cache), "--follow-imports=silent", "--no-error-summary"]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *modules, "-m", "misuse"],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": os.pathsep.join(map(str, (stubs, tmp_path)))},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if ": error: " in line]
    in_stubs = [line for line in lines if str(stubs) in line]  # not of interest
    found = [line for line in lines if line not in in_stubs]
    assert [re.findall(r"\bde\w+_cuda_engine|TF\d+", line) for line in found] == [
        ["deserialise_cuda_engine"],
        ["TF33"],
    ], found


def published(stubs: Path) -> dict[str, dict[str, list[list[str]]]]:
    """Return the parameters of every overload of every member of every class."""
    tree = ast.parse((stubs / "tensorrt" / "__init__.pyi").read_text())
    found: dict[str, dict[str, list[list[str]]]] = {}
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        members: dict[str, list[list[str]]] = {}
        for node in kind.body:
            if isinstance(node, ast.FunctionDef):
                unknown = ["*"] if node.args.vararg else []
                names = [a.arg for a in node.args.args]
                members.setdefault(node.name, []).append(names + unknown)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                members[node.target.id] = []
        found[kind.name] = members
    return found


@pytest.mark.slow
def test_the_stand_in_has_nothing_of_its_own(flavour: str, stubs: Path, install, levers) -> None:
    real, seen = published(stubs), 0
    if "set_device_memory" not in real["IExecutionContext"]:
        levers.fails.add("old")
    for name, kind in vars(install(flavour)).items():
        if not isinstance(kind, type) or kind is object:
            continue
        for member, value in vars(kind).items():
            if member.startswith("_"):
                continue
            assert member in real[name], f"{name}.{member}"
            seen += 1
            if inspect.isfunction(value) and ["self", "*"] not in real[name][member]:
                assert list(inspect.signature(value).parameters) in real[name][member]
    assert seen > 50
