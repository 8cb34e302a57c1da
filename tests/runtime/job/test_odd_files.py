"""Names that are no UTF-8, and pipes where files belong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.job.qsm_ci import DIPOLE, flags_of
from qsm_deploy.runtime.job.request import make_request

PROGRAM = "import sys; from qsm_deploy.runtime.cli import main; sys.exit(main(sys.argv[1:]))"


def test_names_that_are_no_utf8_come_out_as_they_went_in(card, write_model, write_volume, field):
    model = write_model(card)
    volume = write_volume(field, os.fsdecode(b"field\xff.nii.gz"))
    labels = write_volume((field != 0).astype("int16"), os.fsdecode(b"labels\xfe.nii.gz"))
    folder = volume.parent
    names = [b"chi\xff.nii.gz", b"chi\xff.json", b"run\xff.json", b"chi\xff.png"]
    output, _, report, figure = (folder / os.fsdecode(name) for name in names)
    words = [sys.executable, "-c", PROGRAM, model, volume, "--truth", volume, "--labels", labels]
    words += ["-o", output, "--report", report, "--figure", figure]
    done = subprocess.run([os.fsencode(w) for w in words], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, os.fsencode(output) + b"\n"), done.stderr
    assert set(names) <= set(os.listdir(os.fsencode(folder)))
    assert json.loads(report.read_text("utf-8"))["input"]["labels"] == labels.name


@pytest.mark.parametrize("name", ["mask", "truth", "params"])
def test_a_pipe_is_no_input(write_volume, field, tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    given = {name: tmp_path / "pipe"}
    with pytest.raises(DataError, match="pipe: no regular file"):
        make_request([write_volume(field, "field.nii")], **given)


def test_a_pipe_is_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(DataError, match="no regular file"):
        flags_of(tmp_path / "config.json", DIPOLE)


@pytest.mark.parametrize("output", ["pipe.nii", "folder.nii", "zero.nii"])
def test_an_output_that_is_no_file_is_refused(write_volume, field, tmp_path, output):
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "folder.nii").mkdir()
    Path(tmp_path / "zero.nii").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"is a folder|is not a regular file"):
        make_request([write_volume(field, "field.nii")], output=tmp_path / output, force=True)
