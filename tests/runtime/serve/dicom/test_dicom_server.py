"""Studies in, maps out, and what becomes of either when something is in the way."""

import os
import stat
import threading
import time

import pytest
from pydicom.uid import generate_uid

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.serve.dicom.entities import Entity
from qsm_deploy.runtime.serve.dicom.spool import Spool
from tests.runtime.serve.dicom.conftest import (
    HOST,
    archive_on,
    associate,
    mr_image,
    push,
    series_of,
)
from tests.runtime.serve.waiting import wait_until

OF_A_PATIENT = ("DOE", "JANE", "P-0815", "19600101", "A77", "Kopf")


def require_anonymous(log, *uids):
    text = "\n".join(log)
    assert not [word for word in (*OF_A_PATIENT, *uids) if word in text]


def test_a_study_comes_back_as_a_map_and_nothing_stays(serve, archive, reconstruction):
    running, images = serve(), series_of(5)
    assert push(running.port, images) == [0x0000] * 5
    running.wait_for("sent, 5 images")
    assert {i.StudyInstanceUID for i in archive.images.values()} == {images[0].StudyInstanceUID}
    assert {i.SeriesNumber for i in archive.images.values()} == {501}
    assert archive.calling == {"QSM"}
    (seen,) = reconstruction.seen
    assert [i.SOPInstanceUID for i in seen] == [i.SOPInstanceUID for i in images]
    assert [i.PixelData for i in seen] == [i.PixelData for i in images]
    assert not list(running.spool.folder.glob("study-*"))
    assert not list(running.spool.work.iterdir())
    assert running.said("study 1: 5 images of series 5 (5); begun")
    require_anonymous(running.log, images[0].StudyInstanceUID)


def test_two_studies_come_image_by_image_over_many_associations(serve, archive, reconstruction):
    running, first, second = serve(), series_of(4), series_of(4)
    for pair in zip(first, second, strict=True):
        for image in pair:
            assert push(running.port, [image]) == [0x0000]
    wait_until(lambda: len(running.said("sent, 4 images")) == 2)
    studies = [{image.StudyInstanceUID for image in seen} for seen in reconstruction.seen]
    assert studies == [{first[0].StudyInstanceUID}, {second[0].StudyInstanceUID}]
    assert len(archive.images) == 8


def test_images_that_come_later_are_a_new_round(serve, reconstruction):
    reconstruction.gate.clear()
    running, images = serve(), series_of(4)
    push(running.port, images[:3])
    assert reconstruction.entered.wait(10)
    push(running.port, images[3:])
    reconstruction.gate.set()
    wait_until(lambda: len(reconstruction.seen) == 2)
    assert [len(seen) for seen in reconstruction.seen] == [3, 1]


def test_an_image_that_is_sent_again_counts_once(serve, reconstruction):
    running, images = serve(), series_of(2)
    push(running.port, [*images, *images])
    running.wait_for("sent, 2 images")
    assert len(reconstruction.seen[0]) == 2


def test_nothing_is_sent_of_what_is_refused(serve, archive, reconstruction):
    reconstruction.fault = DataError("there are no phase images")
    running = serve()
    push(running.port, series_of(2))
    line = running.wait_for("refused, there are no phase images")
    assert "nothing is sent, its images are removed" in line
    wait_until(lambda: not running.files)
    assert not archive.images


def test_a_fault_says_where_and_nothing_of_the_patient(serve, reconstruction):
    reconstruction.fault = ValueError("could not convert DOE^JANE")
    running = serve()
    push(running.port, series_of(1))
    assert "a fault in the program (ValueError in" in running.wait_for("failed")
    require_anonymous(running.log)
    reconstruction.fault = None
    push(running.port, series_of(1))
    running.wait_for("sent, 1 images")


def test_a_map_waits_until_its_destination_is_there(serve, archive):
    with archive_on() as gone:
        pass
    running = serve(to=Entity("PACS", HOST, gone.port))
    push(running.port, series_of(3))
    running.wait_for("not sent")
    assert "no connection (Connection refused); 1 wait, next try in 0.2 s" in running.log[-1]
    assert running.said("next try in 0.4 s") or running.wait_for("next try in 0.4 s")
    assert {path.parent.name for path in running.files} == {"map"}
    with archive_on(gone.port) as back:
        running.wait_for("sent, 3 images")
        assert len(back.images) == 3
    wait_until(lambda: not running.files)


@pytest.mark.parametrize(
    ("status", "to", "why"),
    [
        (0xA700, "PACS", "refuses an image with status 0xA700"),
        (0x0000, "OTHER", "rejects the association"),
    ],
)
def test_a_map_that_is_not_taken_stays(serve, archive, status, to, why):
    archive.status = status
    running = serve(to=Entity(to, HOST, archive.port))
    push(running.port, series_of(1))
    assert why in running.wait_for("not sent")
    assert len(running.files) == 1
    archive.status = 0x0000
    if to == "PACS":
        running.wait_for("sent, 1 images")


def test_a_map_that_nobody_takes_does_not_keep_others_back(serve, archive):
    archive.status = 0xA900
    running = serve(pause_s=0.5)
    push(running.port, series_of(1))
    running.wait_for("status 0xA900")
    poison = set(archive.refused)
    archive.status, archive.poison = 0x0000, poison
    push(running.port, series_of(2))
    running.wait_for("study 2: sent, 2 images")
    assert not running.said("study 1: sent")


def test_an_unsent_map_survives_the_server(serve, archive):
    archive.status = 0xA700
    running = serve(pause_s=30)
    push(running.port, series_of(3))
    running.wait_for("not sent")
    running.stop()
    archive.status = 0x0000
    again = serve()
    again.wait_for("sent, 3 images")
    assert len(archive.images) == 3
    wait_until(lambda: not again.files)


def test_images_survive_the_server(serve, archive):
    running, images = serve(settle_s=60), series_of(4)
    push(running.port, images[:2])
    running.stop()
    assert not running.said("begun")
    again = serve()
    push(again.port, images[2:])
    again.wait_for("study 1: 4 images")
    again.wait_for("sent, 4 images")


def test_stopping_finishes_the_map_that_is_made_and_keeps_the_rest(serve, archive, reconstruction):
    reconstruction.gate.clear()
    running = serve()
    push(running.port, series_of(2))
    assert reconstruction.entered.wait(10)
    push(running.port, series_of(3))
    running.server.stop()
    time.sleep(0.5)
    assert not associate(running.port).is_established
    reconstruction.gate.set()
    running.stop()
    assert len(archive.images) == 2
    assert len(list(running.spool.folder.glob("study-*/images/*.dcm"))) == 3


def test_a_study_that_kills_the_server_is_given_up(serve, tmp_path):
    spool = Spool(tmp_path / "spool", 1 << 24)
    with spool:
        study = spool.new_round("ab")
        image = mr_image(generate_uid())
        image.save_as(study.images / "5-1.dcm", enforce_file_format=True)
        assert [study.begin(), study.begin()] == [1, 2]
    running = serve()
    assert "the server was killed 2 times" in running.wait_for("refused")
    wait_until(lambda: not running.files)


def test_the_quota_refuses_and_then_takes_again(serve, archive, reconstruction):
    reconstruction.gate.clear()
    running, images = serve(quota=5000), series_of(6)
    statuses = push(running.port, images)
    assert set(statuses) == {0x0000, 0xA700}
    assert "more than 5000 bytes" in running.wait_for("an image is refused")
    assert not list(running.spool.work.iterdir())
    assert reconstruction.entered.wait(10)
    reconstruction.gate.set()
    running.wait_for("sent, ")
    assert push(running.port, images[-1:]) == [0x0000]


def test_a_full_disk_refuses_and_leaves_no_half_file(serve, monkeypatch):
    running, images = serve(settle_s=60), series_of(2)
    assert push(running.port, images[:1]) == [0x0000]

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.fsync", full)
    assert push(running.port, images[1:]) == [0xA700]
    assert "No space left" in running.wait_for("an image is refused")
    assert len(running.files) == 1
    assert not list(running.spool.work.iterdir())


def test_files_are_private(serve, monkeypatch):
    running = serve(settle_s=60)
    push(running.port, series_of(1))
    for path in (running.spool.folder, *running.spool.folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert path.name == ".lock" or mode == (0o700 if path.is_dir() else 0o600)
    (only,) = running.files
    assert only.name.startswith("5-")


def test_a_spool_is_for_one_server_and_nothing_else(tmp_path):
    folder = tmp_path / "spool"
    with Spool(folder, 1), pytest.raises(UsageError, match="a running server"):
        Spool(folder, 1).__enter__()
    (folder / "letters.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        Spool(folder, 1).__enter__()
    assert (folder / "letters.txt").exists()


def test_what_was_unfinished_is_removed_at_the_start(tmp_path):
    folder = tmp_path / "spool"
    (folder / ".work" / "half").mkdir(parents=True)
    (folder / ".work" / "half" / "secret.nii").write_bytes(b"x")
    (folder / "study-ab-cd" / "images").mkdir(parents=True)
    with Spool(folder, 1 << 20) as spool:
        assert not list(spool.work.iterdir())
        assert not list(spool.leftovers())
        assert not (folder / "study-ab-cd").exists()


def test_many_at_once(serve, archive):
    """As many associations as there may be, each with a study of its own."""
    running, studies = serve(), [series_of(10) for _ in range(2)]
    threads = [threading.Thread(target=push, args=(running.port, study)) for study in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    wait_until(lambda: len(archive.images) == 20)


def test_a_reconstruction_that_writes_nothing_is_no_map(serve):
    running = serve(reconstruct=lambda images, target: None)
    push(running.port, series_of(1))
    running.wait_for("refused, no map was made of it")
