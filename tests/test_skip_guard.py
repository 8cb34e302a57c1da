"""The guard of ``--strict-skips``, run on small suites of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PASSES = "def test_passes(): pass\n"
SKIPS = {
    "a test": "import pytest\ndef test_hides(): pytest.skip('not today')\n",
    "a decorator": "import pytest\n@pytest.mark.skip(reason='not today')\ndef test_hides(): ...\n",
    "a fixture": "import pytest\n@pytest.fixture\ndef gone(): pytest.skip('not today')\n"
    "def test_hides(gone): ...\n",
    "a module": "import pytest\npytest.importorskip('no_such_library', reason='not today')\n",
}
ALLOWED = {
    "no GPU": "import pytest\ndef test_device(): pytest.skip('no GPU')\n",
    "no TensorRT": "import pytest\ndef test_headers(): pytest.skip('no TensorRT headers')\n",
    "no VNNI": "import pytest\ndef test_int8(): pytest.skip('no VNNI and no AMX')\n",
    "no data": "def test_data(shared): assert False\n",
    "expected failure": "import pytest\n@pytest.mark.xfail(reason='known')\n"
    "def test_known(): assert False\n",
}


def run_suite(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"QSM_DEPLOY_SHARED": str(folder / "absent")},
        timeout=60,
    )


def write_suite(folder: Path, texts: dict[str, str]) -> None:
    for number, text in enumerate([PASSES, *texts.values()]):
        (folder / f"test_{number}.py").write_text(text)


@pytest.mark.parametrize("kind", SKIPS)
def test_a_skip_without_permission_fails_the_run_and_is_named(tmp_path, kind):
    write_suite(tmp_path, {kind: SKIPS[kind]})
    run = run_suite(tmp_path, "--strict-skips")
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout
    report = run.stdout.split("skipped without permission")[1]
    assert "test_1.py" in report
    assert "not today" in report


def test_allowed_skips_and_expected_failures_pass(tmp_path):
    write_suite(tmp_path, ALLOWED)
    run = run_suite(tmp_path, "--strict-skips", "-ra")
    assert run.returncode == 0, run.stdout
    assert "1 passed, 4 skipped, 1 xfailed" in run.stdout
    assert "test data not present: ../shared" in run.stdout


def test_it_sees_what_workers_skip(tmp_path):
    write_suite(tmp_path, ALLOWED)
    run = run_suite(tmp_path, "--strict-skips", "-n", "2")
    assert run.returncode == 0, run.stdout
    write_suite(tmp_path, SKIPS)
    run = run_suite(tmp_path, "--strict-skips", "-n", "2")
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout
    report = run.stdout.split("skipped without permission")[1]
    assert report.count("not today") == len(SKIPS)
    assert all(f"test_{n}.py" in report for n, _ in enumerate(SKIPS, start=1))


def test_without_the_option_a_skip_is_only_reported(tmp_path):
    write_suite(tmp_path, SKIPS)
    assert run_suite(tmp_path).returncode == 0
