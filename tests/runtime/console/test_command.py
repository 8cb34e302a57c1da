"""Exit codes and the one line on stderr."""

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from qsm_deploy.kernels import errors
from qsm_deploy.runtime.console.command import run_command

CODES = {
    errors.UsageError: 2,
    errors.DataError: 3,
    errors.GeometryError: 3,
    errors.UnitsError: 3,
    errors.EngineError: 4,
    errors.CardError: 4,
    errors.ExportError: 4,
    errors.AccuracyError: 5,
    errors.MemoryLimitError: 6,
    MemoryError: 6,
    errors.WeightsError: 7,
    KeyboardInterrupt: 130,
}


@pytest.mark.parametrize(("kind", "code"), CODES.items(), ids=lambda v: getattr(v, "__name__", v))
def test_an_error_is_one_line_and_its_exit_code(kind, code, capsys):
    def command() -> str:
        raise kind("what,\nseen")

    assert run_command("qsm-test", command) == code
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.startswith("qsm-test: error: ")
    assert seen.err.count("\n") == 1


def test_the_result_goes_to_stdout(capsys):
    assert run_command("qsm-test", lambda: "found") == 0
    assert capsys.readouterr() == ("found\n", "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_bug(closed):
    program = (
        "import sys; from qsm_deploy.runtime.console.command import run_command;"
        "sys.exit(run_command('qsm-test', lambda: str(sys.stderr.isatty())))"
    )
    command = f'"{sys.executable}" -c "{program}" {closed}'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_device_is_one_line():
    program = (
        "import sys; from qsm_deploy.runtime.console.command import run_command;"
        "sys.exit(run_command('qsm-test', lambda: 'found'))"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 3
    assert done.stderr == "qsm-test: error: cannot print the result (No space left on device)\n"


def test_a_bug_keeps_its_trace():
    with pytest.raises(ZeroDivisionError):
        run_command("qsm-test", lambda: 1 // 0)


def test_a_missing_library_names_its_extra():
    error = errors.MissingDependencyError("openvino", "openvino", "--backend openvino")
    assert "pip install '.[openvino]'" in str(error)
    assert error.exit_code == 4


def test_a_reader_that_leaves_early_gets_no_trace():
    program = (
        "import sys\n"
        "from qsm_deploy.runtime.console.command import run_command\n"
        "sys.exit(run_command('qsm-test', lambda: 'line\\n' * 100_000))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stderr, process.stdout as results:
        results.read(10)
        results.close()
        assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 141


@pytest.mark.parametrize(
    "program",
    ["runtime", "runtime.serve", "export", "export.check", "export.bench", "calibration.phantom"],
)
def test_every_program_says_its_version(program, capsys):
    main = importlib.import_module(f"qsm_deploy.{program}.cli").main
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    name, version = capsys.readouterr().out.split()
    assert name.startswith("qsm-")
    assert version == importlib.metadata.version("qsm-deploy")


def test_an_error_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> str:
        raise errors.DataError("sub-\x1b[31m\udcff.nii: no such file")

    assert run_command("qsm-run", command) == 3
    assert capsys.readouterr().err == r"qsm-run: error: sub-\x1b[31m\udcff.nii: no such file" + "\n"
