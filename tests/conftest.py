"""What every test may use: test data, the BIDS validator, a guard against tests that hide."""

import ctypes
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qsm_deploy.kernels.cmake import find_tool

if TYPE_CHECKING:
    from tests.slurm import Slurm

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are loaded: one worker per core
NO_TEST_DATA = "test data not present: ../shared"
# what a skip's reason may start with
ALLOWED_SKIPS = (
    NO_TEST_DATA,
    "no GPU",
    "no VNNI",
    "no TensorRT",
    "no Triton",
    "no valgrind",
    "no clang",
    "no headless browser",
    "no DICOM tool",
    "no network namespace",
    "no SLURM",
)

# folders whose tests share what takes long to make: one worker runs them
TOGETHER = ("tests/runtime/c",)

_hidden = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real test data, a sibling of the checkout; skip where it is absent."""
    beside = Path(__file__).parents[1].with_name("shared")
    folder = Path(os.environ.get("QSM_DEPLOY_SHARED", beside))
    if not (folder / "data").is_dir():
        pytest.skip(NO_TEST_DATA)
    return folder


@pytest.fixture(scope="session")
def compiler() -> str:
    """Return a C++ compiler."""
    found = find_tool("g++")
    if not found:
        pytest.skip("no C++ compiler")
    return str(found)


@pytest.fixture(scope="session")
def slurm() -> Iterator["Slurm"]:
    """Return a SLURM cluster of one node; skip where there can be none."""
    from tests.slurm import missing, started

    if why := missing():
        pytest.skip(f"no SLURM: {why}")
    with started() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def build_twin(compiler: str) -> Callable[..., ctypes.CDLL]:
    """Return what compiles the host twin of the CUDA library, and what else is named."""
    from tests.host_twin import build_host_twin

    return partial(build_host_twin, compiler)


@pytest.fixture(scope="session")
def twin_handle(
    build_twin: Callable[..., ctypes.CDLL], tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    """Return the CUDA library's sources compiled without CUDA."""
    return build_twin(tmp_path_factory.mktemp("twin"))


@pytest.fixture(scope="session")
def tensorrt_include() -> Path:
    """Return the folder of TensorRT's headers, which are in no wheel."""
    folder = os.environ.get("QSM_TENSORRT_INCLUDE")
    if not folder:
        pytest.skip("no TensorRT headers: QSM_TENSORRT_INCLUDE names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def kept_traces(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Trace no network twice, nor one that an earlier run has traced."""
    from tests.kept_traces import keep_traces

    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("traces") if cache else tmp_path_factory.mktemp("traces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qsm_deploy.export.graph.onnx_export.trace", keep_traces(folder))
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help="fail if a test or module is skipped for another reason than: "
        + "; ".join(ALLOWED_SKIPS),
    )
    parser.addoption(
        "--counts",
        type=Path,
        help="run the tests that count what they try, and append it to this file",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("strict_skips"):
        config.stash[_hidden] = []
        config.pluginmanager.register(_SkipGuard(config.stash[_hidden]), "strict-skips")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one worker, and each folder of ``TOGETHER``."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((folder for folder in TOGETHER if file.startswith(folder)), file)

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("counts"):
        items[:] = [item for item in items if "note_counts" in getattr(item, "fixturenames", ())]


class _SkipGuard:
    """Collects the skips that are not allowed, of tests and of whole modules."""

    def __init__(self, hidden: list[str]) -> None:
        self.hidden = hidden

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not hasattr(report, "wasxfail"):
            self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
            if not reason.startswith(ALLOWED_SKIPS):
                self.hidden.append(f"{report.nodeid}: {reason}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.hidden:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.hidden:
            terminalreporter.section("skipped without permission", red=True)
            for line in self.hidden:
                terminalreporter.line(line)


@pytest.fixture
def note_counts(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Return a function that notes how much a test has tried, for docs/reliability.md.

    It takes what was damaged or killed, ``inputs`` or ``kills``, and what became of how many.
    """

    def note(what: str, **counts: int) -> None:
        if path := pytestconfig.getoption("counts"):
            with path.open("a") as file:
                file.write(json.dumps({"what": what, **counts}) + "\n")

    return note


@pytest.fixture
def validate(tmp_path: Path) -> Callable[[Path], list[tuple[str, str]]]:
    """Return a function that gives the errors of the BIDS validator: codes and locations."""
    import bids_validator_deno  # here, for the tests of the kernels run where it is not installed
    import deno

    bundle = Path(bids_validator_deno.__file__).with_name("bids-validator.js")
    command = [deno.find_deno_bin(), "--allow-read", "--allow-env", str(bundle)]
    own = {"DENO_DIR": str(tmp_path / "deno"), "DENO_NO_UPDATE_CHECK": "1"}

    def errors(folder: Path) -> list[tuple[str, str]]:
        done = subprocess.run(
            [*command, str(folder), "--format", "json"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | own,
        )
        issues = json.loads(done.stdout)["issues"]["issues"]
        return [(i["code"], i["location"]) for i in issues if i["severity"] == "error"]

    return errors


@pytest.fixture(autouse=True)
def _no_deepbet(monkeypatch):
    """Find masks as without the extra, whose library takes seconds for each."""
    monkeypatch.setattr("qsm_deploy.runtime.local_field.masks.has_deepbet", lambda: False)
