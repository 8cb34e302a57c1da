"""The command line of the DICOM server, and its process from start to end."""

import importlib.util
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import generate_uid

from qsm_deploy.runtime.serve.cli import main
from tests.runtime.serve.dicom.conftest import HOST, associate, mr_image, push
from tests.runtime.serve.waiting import wait_until

DICOM = ("--dicom", f"QSM@{HOST}:0", "--send-to", f"PACS@{HOST}:9")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--dicom", "QSM@127.0.0.1:0"), "--dicom needs --send-to"),
        ((*DICOM, "--host", "0.0.0.0"), "--host is not for --dicom"),
        ((*DICOM, "--port", "0"), "--port is not for --dicom"),
        ((*DICOM, "--openrecon", "x"), "--openrecon is not for --dicom"),
        ((*DICOM, "--session-seconds", "9"), "--session-seconds is not for --dicom"),
        ((*DICOM, "--tls-cert", "a.pem"), "--tls-cert FILE and --tls-key FILE go together"),
        ((*DICOM, "--tls-ca", "a.pem"), "--tls-cert FILE and --tls-key FILE go together"),
        (("--dicom", "QSM@::1:0", "--send-to", "P@h:0"), "brackets"),
        (("--dicom", "QSM@h:1", "--send-to", "P@h:0"), "port 0"),
        (("--send-to", "PACS@127.0.0.1:9"), "--send-to needs --dicom"),
        (("--settle", "9"), "--settle needs --dicom"),
        (("--quota", "9G"), "--quota needs --dicom"),
        (("--allow", "SCANNER@10.0.0.5"), "--allow AE@ADDRESS is for --dicom"),
        (("a.onnx", "b.onnx"), "several models"),
    ],
)
def test_flags_that_do_not_go_together(capsys, words, said):
    try:
        code = main(words)
    except SystemExit as left:  # argparse's own
        code = left.code
    assert code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("library", ["pynetdicom", "dcm2niix"])
def test_without_the_packages_the_extra_is_named(monkeypatch, capsys, library):
    find = importlib.util.find_spec
    missing = lambda name, *more: None if name == library else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert main(DICOM) == 4
    assert "pip install '.[dicom]'" in capsys.readouterr().err


def test_no_such_certificate(capsys, tmp_path):
    files = [str(tmp_path / name) for name in ("a.pem", "a.key")]
    assert main([*DICOM, "--tls-cert", files[0], "--tls-key", files[1]]) == 3
    assert "a.pem: No such file" in capsys.readouterr().err
    os.mkfifo(files[0])
    assert main([*DICOM, "--tls-cert", files[0], "--tls-key", files[1]]) == 3
    assert "a.pem: no regular file" in capsys.readouterr().err


@contextmanager
def process(tmp_path, *flags, own=f"QSM@{HOST}:0"):
    """Run qsm-serve, and give its log, and what port it is on."""
    log = tmp_path / "log"
    command = [
        *(sys.executable, "-m", "qsm_deploy.runtime.serve.cli", "--dicom", own),
        *("--send-to", f"PACS@{HOST}:9", "--settle", "0.5", *flags),
    ]
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    with (
        log.open("w") as to,
        subprocess.Popen(command, stdout=to, stderr=to, env=env) as running,
    ):
        try:
            wait_until(lambda: "ready on" in log.read_text() or running.poll() is not None, 30)
            yield running, log
        finally:
            running.kill()


def port_in(log) -> int:
    return int(log.read_text().split("ready on ")[1].split(": ")[0].rsplit(":", 1)[1])


def test_a_process_from_start_to_end(tmp_path):
    """It refuses a study that is no gradient echo, and says nothing of whose it is."""
    with process(tmp_path) as (running, log):
        study = generate_uid()
        images = [mr_image(study, n, SeriesDescription="JANE's head") for n in range(3)]
        for keyword, value in (("ImagePositionPatient", b"DOE\\1\\2 "), ("EchoTime", b"JANE")):
            tag = Tag(keyword)  # unread, since pydicom takes no such numbers
            raw = RawDataElement(tag, "DS", len(value), value, 0, False, True)
            images[0][tag] = raw
        assert push(port_in(log), images) == [0] * 3
        wait_until(lambda: "refused" in log.read_text())
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0
        text = log.read_text()
    assert "stopping" in text
    assert text.endswith("stopped\n")
    assert "Traceback" not in text
    for word in ("DOE", "JANE", "P-0815", "19600101", "A77", "Kopf", study):
        assert word not in text
    (spool,) = (tmp_path / "state" / "qsm-deploy").iterdir()
    assert spool.stat().st_mode & 0o777 == 0o700
    assert not list(spool.glob("study-*"))


def test_a_taken_port_is_a_usage_error(tmp_path):
    with process(tmp_path) as (_, log):
        port = port_in(log)
        other = ("--spool", str(tmp_path / "other"))
        (tmp_path / "second").mkdir()
        with process(tmp_path / "second", *other, own=f"QSM@{HOST}:{port}") as (second, said):
            assert second.wait(20) == 2
        assert f"cannot listen on {HOST}:{port}" in said.read_text()


@pytest.mark.parametrize(
    ("flags", "who"), [((), "anyone who reaches the port"), (("--allow", "A@::1"), "A@::1/128")]
)
def test_listening_to_other_machines_is_warned_of(tmp_path, flags, who):
    with process(tmp_path, *flags, own="QSM@0.0.0.0:0") as (_, log):
        wait_until(lambda: "DICOM has no password" in log.read_text())
        assert f"no password: {who} may use" in log.read_text()
        assert "go over the network as they are" in log.read_text()
        assert associate(port_in(log)).is_established == (not flags)
