"""A real archive in a network namespace of its own, since Orthanc listens on every address."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.runtime.serve.waiting import wait_until

HTTP, DICOM = 8042, 4242


def require_namespace_and_orthanc() -> None:
    """Skip where either is missing."""
    if shutil.which("Orthanc") is None and not Path("/usr/sbin/Orthanc").exists():
        pytest.skip("no DICOM tool: Orthanc")
    made = ["unshare", "-rn", "true"]
    if shutil.which("unshare") is None or subprocess.run(made, check=False).returncode:
        pytest.skip("no network namespace: unshare -rn makes none here")


def rerun_alone(test_file: str, name: str) -> None:
    """Run a test of a file again, in a network namespace with a loopback of its own."""
    require_namespace_and_orthanc()
    inside = 'ip link set lo up && exec "$@"'
    test = [sys.executable, "-m", "pytest", "-q", "-n0", "-x", f"{test_file}::{name}"]
    done = subprocess.run(
        ["unshare", "-rn", "sh", "-c", inside, "sh", *test],
        env={**os.environ, "QSM_ALONE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]


@contextmanager
def orthanc_in(folder: Path, modalities: dict[str, list[object]]) -> Iterator["Orthanc"]:
    """Run it, with its database in a folder."""
    settings = folder / "orthanc.json"
    settings.write_text(
        json.dumps(
            {
                "StorageDirectory": str(folder / "archive"),
                "IndexDirectory": str(folder / "archive"),
                "HttpPort": HTTP,
                "DicomPort": DICOM,
                "DicomAet": "PACS",
                "DicomCheckCalledAet": True,
                "DicomModalities": modalities,
                "RemoteAccessAllowed": False,
                "AuthenticationEnabled": False,
                "Plugins": [],
            }
        )
    )
    program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
    with (folder / "orthanc.log").open("w") as log:
        process = subprocess.Popen([program, str(settings)], stdout=log, stderr=log)
        try:
            archive = Orthanc()
            wait_until(archive.answers, 30)
            yield archive
        finally:
            process.terminate()
            process.wait(20)


class Orthanc:
    """Its REST interface."""

    def answers(self) -> bool:
        """Return whether it is up."""
        try:
            return bool(self.get("system"))
        except OSError:
            return False

    def get(self, path: str):
        """Return what it says of something."""
        with urlopen(f"http://127.0.0.1:{HTTP}/{path}", timeout=20) as answer:
            return json.load(answer)

    def file(self, instance: str) -> bytes:
        """Return an image as it was stored."""
        with urlopen(f"http://127.0.0.1:{HTTP}/instances/{instance}/file", timeout=20) as answer:
            return answer.read()
