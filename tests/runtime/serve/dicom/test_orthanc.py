"""The whole loop: a scanner's series, ``qsm-serve`` in its own process, a real Orthanc."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from tests.runtime.dicom.vendors import NAME, SHAPE, write_series
from tests.runtime.serve.dicom.conftest import HOST, push
from tests.runtime.serve.dicom.orthanc import DICOM, orthanc_in, rerun_alone
from tests.runtime.serve.waiting import wait_until

pytestmark = pytest.mark.slow
PORT, TITLE = 11112, "QSM"
ALONE = "QSM_ALONE" in os.environ


@contextmanager
def qsm_serve(log: Path, *flags: str, killed: bool = False):
    """Run qsm-serve until SIGTERM, which it must obey."""
    command = [
        *(sys.executable, "-m", "qsm_deploy.runtime.serve.cli"),
        *("--dicom", f"{TITLE}@{HOST}:{PORT}", "--send-to", f"PACS@{HOST}:{DICOM}"),
        *("--settle", "2", "--threads", "1", *flags),
    ]
    log.touch()
    before = log.stat().st_size
    with log.open("a") as to, subprocess.Popen(command, stderr=to, stdout=to) as process:
        try:
            wait_until(lambda: "ready on" in log.read_text()[before:] or process.poll(), 60)
            assert process.poll() is None, log.read_text()
            yield process
            if not killed:
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
        finally:
            process.kill()


def sent(folder: Path):
    """Return the images of a folder as a scanner sends them."""
    return [dcmread(path) for path in sorted(folder.rglob("*.dcm"))]


def require_map(archive, scan: Path) -> None:
    """Look for the map in the study: it is what qsm-run makes of the same images."""
    (study,) = archive.get("studies")
    series = [archive.get(f"series/{s}") for s in archive.get(f"studies/{study}")["Series"]]
    (made,) = [s for s in series if "QSM" in s["MainDicomTags"].get("SeriesDescription", "")]
    images = [dcmread(BytesIO(archive.file(i))) for i in made["Instances"]]
    assert {str(image.PatientName) for image in images} == {NAME}
    here = scan.with_name("here")
    command = [sys.executable, "-m", "qsm_deploy.runtime.cli", "-q", "--dicom", scan]
    subprocess.run([*command, "--dicom-out", here], check=True)
    expected = {tuple(i.ImagePositionPatient): i.pixel_array for i in sent(here)}
    assert len(images) == len(expected) == SHAPE[2]
    for image in images:
        ppb = expected[tuple(image.ImagePositionPatient)]
        np.testing.assert_allclose(image.pixel_array, ppb, atol=1)
    assert np.ptp([ppb for ppb in expected.values()]) > 100


def require_anonymous(log: Path) -> None:
    text = log.read_text()
    for word in (*NAME.split("^"), "P-0815", "19600101", "A77", "Kopf", "qsm_gre", "Traceback"):
        assert word not in text


def scene(tmp_path, archive, *flags):
    """Push a series into the archive and to the server, which is killed twice in the middle."""
    write_series(tmp_path / "scan", "siemens")
    images, log = sent(tmp_path / "scan"), tmp_path / "server.log"
    assert set(push(DICOM, images, called="PACS")) == {0}
    flags = (*flags, "--spool", str(tmp_path / "spool"))
    with qsm_serve(log, *flags, killed=True) as process:
        assert set(push(PORT, images[:20])) == {0}
        process.kill()
    with qsm_serve(log, *flags, killed=True) as process:
        assert set(push(PORT, images[20:])) == {0}
        wait_until(lambda: "begun" in log.read_text(), 30)
        process.kill()
    assert f"{len(images)} images of series 11 (72), 12 (72); begun" in log.read_text()
    with qsm_serve(log, *flags):
        wait_until(lambda: "sent, 24 images" in log.read_text(), 240)
    require_map(archive, tmp_path / "scan")
    require_anonymous(log)
    assert not list((tmp_path / "spool").glob("study-*"))


def test_a_map_comes_back_into_the_study(tmp_path):
    if not ALONE:
        rerun_alone(__file__, "test_a_map_comes_back_into_the_study")
        return
    with orthanc_in(tmp_path, {"QSM": [TITLE, HOST, PORT]}) as archive:
        scene(tmp_path, archive, "--allow", f"SCANNER@{HOST}")


def test_an_archive_that_is_down_gets_the_map_when_it_is_up(tmp_path):
    """With dcmtk's storescu as the scanner, and a refused study before."""
    if not ALONE:
        rerun_alone(__file__, "test_an_archive_that_is_down_gets_the_map_when_it_is_up")
        return
    if shutil.which("storescu") is None:
        pytest.skip("no DICOM tool: storescu, of dcmtk")
    write_series(tmp_path / "scan", "ge")
    write_series(tmp_path / "magnitude", "philips", edit=lambda i: i.role != "phase")
    log, spool = tmp_path / "server.log", str(tmp_path / "spool")
    store = ["storescu", "-aet", "SCANNER", "-aec", TITLE, "+sd", HOST, str(PORT)]
    with qsm_serve(log, "--spool", spool):
        subprocess.run([*store, tmp_path / "magnitude"], check=True)
        wait_until(lambda: "refused" in log.read_text(), 60)
        subprocess.run([*store, tmp_path / "scan"], check=True)
        wait_until(lambda: "not sent" in log.read_text(), 240)
        with orthanc_in(tmp_path, {}) as archive:
            wait_until(lambda: "sent, 24 images" in log.read_text(), 60)
            require_map(archive, tmp_path / "scan")
    require_anonymous(log)
