"""What every test may use: the test data, and a guard against tests that hide by skipping."""

import os
from pathlib import Path

import pytest

NO_TEST_DATA = "test data not present: ../shared"
ALLOWED_SKIPS = (NO_TEST_DATA, "no GPU", "no TensorRT")  # what a skip's reason may start with

_hidden = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real test data, a sibling of the checkout; skip where it is absent."""
    beside = Path(__file__).parents[1].with_name("shared")
    folder = Path(os.environ.get("QSM_DEPLOY_SHARED", beside))
    if not (folder / "data").is_dir():
        pytest.skip(NO_TEST_DATA)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help="fail if a test or module is skipped for another reason than: "
        + "; ".join(ALLOWED_SKIPS),
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("strict_skips"):
        config.stash[_hidden] = []
        config.pluginmanager.register(_SkipGuard(config.stash[_hidden]), "strict-skips")


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
