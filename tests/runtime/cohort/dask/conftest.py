"""A real scheduler and real workers on loopback, and qsm-run in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
PROGRAM = "import sys; from qsm_deploy.runtime.cli import main; sys.exit(main(sys.argv[1:]))"
WAIT_S = 60.0
# what the children of a worker do as they open what matches
AS_THEY_OPEN = """\
import os, re, signal, sys, time

def hook(event, given):
    if event == "open" and re.search({pattern!r}, str(given[0])):
        {then}

if "qsm_deploy.runtime.cohort.child" in str(sys.orig_argv):
    sys.addaudithook(hook)
"""


@dataclass
class Dask:
    """A scheduler on loopback, and its workers, each with a nanny that starts it again.

    Attributes
    ----------
    folder
        For what it writes.
    flags
        Of scheduler and workers alike.
    """

    folder: Path
    flags: tuple[str, ...] = ()
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def _about(self) -> Path:
        return self.folder / "scheduler.json"

    @property
    def address(self) -> str:
        return str(json.loads(self._about.read_text())["address"])

    def start(self, protocol: str = "tcp") -> None:
        where = ("--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0")
        written = ("--scheduler-file", str(self._about), "--protocol", protocol)
        self._spawn("scheduler", *where, *written)
        self._until(self._about.exists)

    def add_worker(self, *flags: str) -> "subprocess.Popen[bytes]":
        """Start a worker, and wait until it is one."""
        log = self.folder / f"{len(self.processes)}.log"
        scratch = ("--local-directory", str(self.folder / "scratch"))
        worker = self._spawn("worker", self.address, "--nthreads", "1", *scratch, *flags)
        self._until(lambda: b"Registered to" in log.read_bytes())
        return worker

    def log_of(self, process: "subprocess.Popen[bytes]") -> str:
        return (self.folder / f"{self.processes.index(process)}.log").read_text()

    def _spawn(self, *words: str) -> "subprocess.Popen[bytes]":
        log = self.folder / f"{len(self.processes)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *words, *self.flags],
                stdout=out,
                stderr=out,
                env=os.environ | self.environment,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def _until(self, holds: Callable[[], bool]) -> None:
        until = time.monotonic() + WAIT_S
        while not holds():
            assert time.monotonic() < until, self.log_of(self.processes[-1])
            time.sleep(0.05)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """End a process and those of its session, as when the power fails."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def new_dask(tmp_path) -> Iterator[Callable[..., Dask]]:
    """Return a function that prepares a scheduler with flags of its own."""
    made = []

    def prepare(*flags: str) -> Dask:
        folder = tmp_path / f"dask{len(made)}"
        folder.mkdir()
        made.append(Dask(folder, flags))
        return made[-1]

    yield prepare
    for process in [process for one in made for process in one.processes]:
        if process.poll() is None:
            kill(process)


@pytest.fixture
def dask(new_dask) -> Dask:
    """Return a scheduler that runs, without workers."""
    cluster: Dask = new_dask()
    cluster.start()
    return cluster


@pytest.fixture
def as_they_open(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """Return a function that lets children run a statement as they open what matches."""

    def let(pattern: str, then: str) -> None:
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(AS_THEY_OPEN.format(pattern=pattern, then=then))
        before = os.environ.get("PYTHONPATH", "")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), before])))

    return let


class Run:
    """qsm-run, while it runs."""

    def __init__(self, *words: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.err = ""

    def until(self, text: str, times: int = 1) -> None:
        """Wait until it has said something, so many times."""
        assert self.process.stderr is not None
        while self.err.count(text) < times:
            line = self.process.stderr.readline()
            assert line, self.err
            self.err += line

    def end(self) -> tuple[int, str, str]:
        """Wait for its end, and return its exit code and what it said."""
        out, err = self.process.communicate(timeout=2 * WAIT_S)
        return self.process.returncode, out, self.err + err


def run(*words: object) -> tuple[int, str, str]:
    """Run qsm-run to its end."""
    return Run(*words).end()
