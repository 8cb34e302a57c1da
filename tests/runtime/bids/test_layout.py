"""Recordings and metadata of a BIDS dataset, and one clear line where it is not one."""

import json
import re

import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError, UnitsError, UsageError
from qsm_deploy.runtime.bids.layout import BidsImage
from qsm_deploy.runtime.bids.metadata import field_unit, load_metadata, load_params_of
from qsm_deploy.runtime.bids.search import find_recordings, without_recording
from qsm_deploy.runtime.scan.nifti import nifti_bytes

DESCRIPTION = {"Name": "test", "BIDSVersion": "1.10.0"}
PREP = "derivatives/prep"


@pytest.fixture
def dataset(tmp_path):
    """Return a dataset without subjects."""
    root = tmp_path / "ds"
    root.mkdir()
    (root / "dataset_description.json").write_text(json.dumps(DESCRIPTION))
    return root


@pytest.fixture
def add(dataset):
    """Return a function that adds empty files to the dataset."""

    def add_files(*names):
        for name in names:
            path = dataset / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")

    return add_files


@pytest.fixture
def find(dataset):
    """Return a function that finds the recordings."""

    def find_in_dataset(labels=None, source=None):
        found = search(dataset, labels, source)
        assert found.failures == {}
        return found.recordings

    return find_in_dataset


def search(dataset, labels=None, source=None):
    return find_recordings(dataset, labels, source, dataset / "derivatives" / "qsm-deploy")


def echoes(subject, count=2, folder="anat", more="", parts=("mag", "phase")):
    return [
        f"sub-{subject}/{folder}/sub-{subject}_{more}echo-{n}_part-{part}_MEGRE.nii.gz"
        for n in range(1, count + 1)
        for part in parts
    ]


ONE = ["sub-01/anat/sub-01_part-phase_T2starw.nii.gz", "sub-01/anat/sub-01_part-mag_T2starw.nii.gz"]
CARTESIAN = echoes("01", parts=("real", "imag"))


class TestRecordings:
    def test_every_subject_session_acquisition_and_run_is_one(self, add, find):
        add(*echoes("01"), *echoes("02", folder="ses-a/anat", more="ses-a_run-1_"))
        add(*echoes("02", folder="ses-a/anat", more="ses-a_run-2_"), *echoes("02", more="acq-x_"))
        found = find()
        assert [r.name for r in found] == [
            "sub-01", "sub-02_acq-x", "sub-02_ses-a_run-1", "sub-02_ses-a_run-2",
        ]  # fmt: skip
        assert [r.folder.as_posix() for r in found] == [
            "sub-01/anat", "sub-02/anat", "sub-02/ses-a/anat", "sub-02/ses-a/anat",
        ]  # fmt: skip

    def test_phase_and_magnitude_of_the_echoes_are_in_order(self, add, find):
        add(*reversed(echoes("01", count=11)))
        pairs = find()[0].echoes()
        assert [int(phase.entities["echo"]) for phase, _ in pairs] == list(range(1, 12))
        assert {phase.entities["part"] for phase, _ in pairs} == {"phase"}
        assert {magnitude.entities["part"] for _, magnitude in pairs} == {"mag"}

    @pytest.mark.parametrize(
        "name",
        ["anat/sub-01_localfield.nii.gz", "fmap/sub-01_desc-local_fieldmap.nii",
         "anat/sub-01_fieldmap-local.nii"],
    )  # fmt: skip
    @pytest.mark.parametrize("root", ["", f"{PREP}/"])
    def test_a_local_field_comes_before_the_raw_phase(self, add, find, dataset, name, root):
        add(*echoes("01"), f"{root}sub-01/{name}")
        [found] = find()
        assert found.source == "localfield"
        assert found.local_field().path == dataset / root / "sub-01" / name
        [raw] = find(source="megre")
        assert raw.source == "megre"

    def test_what_this_program_made_is_no_input(self, add, find):
        add(*echoes("01"), "derivatives/qsm-deploy/sub-01/anat/sub-01_localfield.nii.gz")
        assert [r.source for r in find()] == ["megre"]

    def test_a_total_field_is_no_local_field(self, add, find):
        add(*echoes("01"), "sub-01/fmap/sub-01_fieldmap.nii.gz")
        assert [r.source for r in find()] == ["megre"]

    def test_participants_are_chosen_with_or_without_the_prefix(self, add, find):
        add(*echoes("01"), *echoes("02"), *echoes("03"))
        assert [r.name for r in find(["03", "sub-01"])] == ["sub-01", "sub-03"]

    def test_a_participant_without_a_recording_is_told(self, add, dataset):
        add(*echoes("01"), "sub-02/anat/sub-02_T1w.nii.gz", "sub-02/fmap/sub-02_phase1.nii.gz")
        found = search(dataset, ["01", "02"])
        [(label, reason)] = without_recording(found, ["01", "sub-02"]).items()
        assert label == "02"
        assert "sub-02_phase1.nii.gz, which is of a field map" in reason

    @pytest.mark.parametrize(
        ("labels", "says"),
        [
            (["9"], "has no sub-9; it has sub-01, sub-02, sub-03, sub-04 and 1 more"),
            (["01", "net.onnx"], "name the model before --participant-label"),
        ],
    )
    def test_an_unknown_participant(self, add, find, labels, says):
        for n in range(1, 6):
            add(*echoes(f"0{n}"))
        with pytest.raises(UsageError, match=says):
            find(labels)


class TestNames:
    @pytest.mark.parametrize(
        "names",
        [
            ["anat/sub-01_part-phase_T2starw.nii.gz", "anat/sub-01_part-mag_T2starw.nii.gz"],
            ["anat/sub-01_part-phase_GRE.nii", "anat/sub-01_GRE.nii"],
            ["swi/sub-01_part-phase_GRE.nii.gz", "swi/sub-01_part-mag_GRE.nii.gz"],
            ["anat/sub-01_part-phase_MEGRE.nii.gz", "anat/sub-01_echo-1_MEGRE.nii.gz"],
            ["anat/sub-01_phase.nii.gz", "anat/sub-01_magnitude.nii.gz"],
            ["anat/sub-01_part-real_MEGRE.nii.gz", "anat/sub-01_part-imag_MEGRE.nii.gz"],
        ],
        ids=lambda names: names[0],
    )
    def test_one_echo(self, add, find, dataset, names):
        add(*(f"sub-01/{name}" for name in names))
        [found] = find()
        paths = [[image.path for image in pair] for pair in found.echoes()]
        assert paths == [[dataset / "sub-01" / name for name in names]]
        assert found.left_over() == []

    def test_phase_and_magnitude_come_before_real_and_imaginary_parts(self, add, find):
        add(*echoes("01"), *CARTESIAN)
        [found] = find()
        assert [[i.part for i in pair] for pair in found.echoes()] == [["phase", "mag"]] * 2
        assert "sub-01_echo-1_part-imag_MEGRE.nii.gz" in found.left_over()[0]

    def test_a_phase_without_its_magnitude_does_not(self, add, find):
        add(*echoes("01", parts=("phase",)), *CARTESIAN)
        assert find()[0].echoes()[0][0].part == "real"

    def test_a_magnitude_that_says_so_comes_before_one_that_does_not(self, add, find):
        add(*echoes("01", 1), "sub-01/anat/sub-01_echo-1_MEGRE.nii.gz")
        assert find()[0].echoes()[0][1].entities["part"] == "mag"

    def test_a_magnitude_of_another_sequence_is_none(self, add, find):
        add(*echoes("01"), "sub-01/anat/sub-01_T2starw.nii.gz")
        assert {i.suffix for pair in find()[0].echoes() for i in pair} == {"MEGRE"}

    @pytest.mark.parametrize(
        ("name", "need"),
        [
            ("fmap/sub-01_phase1.nii.gz", "which is of a field map"),
            ("fmap/sub-01_phasediff.nii.gz", "which is of a field map"),
            ("anat/sub-01_inv-1_part-phase_MP2RAGE.nii.gz", "one of MEGRE, GRE, T2starw"),
            ("anat/sub-01_part-ph_MEGRE.nii.gz", "which needs part-phase, part-real or part-imag"),
            ("anat/sub-01_part-phase_megre.nii.gz", "one of MEGRE, GRE, T2starw"),
            ("anat/sub-01_echo1_part-phase_MEGRE.nii.gz", "which needs a name of BIDS, such as"),
            ("anat/sub-01_part-phase_MEGRE.NII.GZ", "which needs a name of BIDS, such as"),
            ("anat/phase.nii", "which needs a name of BIDS, such as"),
            ("anat/sub-01_run-1_run-2_part-phase_MEGRE.nii", "which needs a name of BIDS, such as"),
            ("anat/ses-a_sub-01_part-phase_MEGRE.nii", "which needs a name of BIDS, such as"),
            ("anat/sub-01-b_localfield.nii.gz", "which needs a name of BIDS, such as"),
            ("anat/sub-01 b_desc-local_fieldmap.nii", "which needs a name of BIDS, such as"),
            ("anat/sub-01_brainmask.nii.gz", "which needs the suffix mask"),
            ("anat/sub-01_brain_mask.nii.gz", "which needs a name of BIDS, such as"),
            ("anat/sub-01_echo-1_MEGRE.nii.gz", "which needs its part-phase"),
            ("gre/sub-01_part-phase_GRE.nii.gz", "which needs to lie in anat, fmap or swi"),
            ("sub-01_part-real_GRE.nii.gz", "which needs to lie in anat, fmap or swi"),
        ],
        ids=lambda text: text.split("/")[-1],
    )
    def test_what_sounds_like_a_gradient_echo_and_is_not_taken_is_named(
        self, add, dataset, name, need
    ):
        add(f"sub-01/{name}", "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/func/sub-01_bold.nii")
        with pytest.raises(DataError, match=re.escape(f"not used: {name.split('/')[-1]}, ")) as no:
            search(dataset)
        assert need in str(no.value)
        assert "T1w" not in str(no.value)
        assert "bold" not in str(no.value)
        add(*echoes("02"))
        [note] = search(dataset).notes()
        assert need in note


class TestFolders:
    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("anat/sub-01_localfield.nii.gz", "is named sub-01 and lies in the folder of sub-02"),
            ("anat/sub-01_mask.nii.gz", "is named sub-01 and lies in the folder of sub-02"),
            (
                "anat/sub-02_ses-a_mask.nii.gz",
                "is named sub-02_ses-a and lies in the folder of sub-02",
            ),
            (
                "ses-a/anat/sub-02_mask.nii.gz",
                "is named sub-02 and lies in the folder of sub-02_ses-a",
            ),
            (
                "ses-a/fmap/sub-02_ses-b_mask.nii.gz",
                "named sub-02_ses-b and lies in the folder of sub",
            ),
        ],
    )
    @pytest.mark.parametrize("root", ["", f"{PREP}/"])
    def test_another_name_than_the_folders(self, add, dataset, root, name, says):
        add(*echoes("01"), *echoes("02"), f"{root}sub-02/{name}")
        found = search(dataset)
        assert [r.name for r in found.recordings] == ["sub-01"]
        assert found.failures.keys() == {"sub-02"}
        assert says in found.failures["sub-02"]

    def test_a_copy_of_a_subject(self, add, dataset):
        add(*echoes("01"))
        (dataset / "sub-01 copy").symlink_to(dataset / "sub-01")
        found = search(dataset)
        assert [r.name for r in found.recordings] == ["sub-01"]
        assert "lies in the folder of sub-01 copy" in found.failures["sub-01 copy"]

    @pytest.mark.parametrize("folder", ["sub-02", "sub-02/anat", f"{PREP}/sub-02/ses-a/fmap"])
    def test_a_folder_that_cannot_be_read(self, add, dataset, monkeypatch, folder):
        add(*echoes("01"), *echoes("02"), f"{PREP}/sub-02/ses-a/fmap/sub-02_ses-a_mask.nii")
        listed = type(dataset).iterdir

        def refuse(path):
            if path == dataset / folder:
                raise PermissionError(13, "Permission denied")
            return listed(path)

        monkeypatch.setattr(type(dataset), "iterdir", refuse)
        found = search(dataset)
        assert [r.name for r in found.recordings] == ["sub-01"]
        assert f"{folder}: cannot be read (Permission denied)" in found.failures["sub-02"]

    @pytest.mark.parametrize(
        ("link", "to"),
        [("sub-02", "../sub-02"), ("sub-02/anat", "nothing"), (f"{PREP}", "nothing"),
         ("sub-02", "sub-02"), ("sub-02/ses-a", ".git/annex/objects/xy")],
    )  # fmt: skip
    def test_a_link_to_no_folder(self, add, dataset, link, to):
        add(*echoes("01"))
        (dataset / link).parent.mkdir(parents=True, exist_ok=True)
        (dataset / link).symlink_to(to)
        found = search(dataset)
        assert [r.name for r in found.recordings] == ["sub-01"]
        [(name, reason)] = found.failures.items()
        assert name == ("prep" if link == PREP else "sub-02")
        assert f"{dataset / link}: " in reason
        assert ("leads back to itself" if to == link else "datalad get") in reason

    @pytest.mark.parametrize("folder", ["sub-02", "sub-02/ses-a/anat", PREP])
    def test_an_empty_folder_is_noted(self, add, dataset, folder):
        add(*echoes("01"))
        (dataset / folder).mkdir(parents=True)
        found = search(dataset)
        [note] = found.notes()
        assert f"/{folder.split('/')[-1]}, which is empty" in note
        assert found.failures == {}

    def test_a_file_in_place_of_a_folder_holds_nothing(self, add, find):
        add(*echoes("01"), "sub-02", f"{PREP}", "sub-01/ses-a")
        assert [r.name for r in find()] == ["sub-01"]


class TestMask:
    def write(self, path, shape=(3, 4, 5)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(nifti_bytes(np.ones(shape, np.uint8), np.eye(4)))
        return path

    def test_the_one_that_says_most_wins(self, add, find, dataset):
        add("sub-01/anat/sub-01_run-1_localfield.nii.gz", "sub-01/anat/sub-01_mask.nii.gz")
        add("sub-01/anat/sub-01_run-1_desc-brain_mask.nii.gz", "sub-01/anat/sub-01_run-2_mask.nii")
        [found] = find()
        mask = found.mask(found.local_field())
        assert mask == dataset / "sub-01/anat/sub-01_run-1_desc-brain_mask.nii.gz"

    def test_that_of_another_derivative_counts_on_the_same_grid(self, find, dataset):
        for name in echoes("01", count=1):
            self.write(dataset / name)
        other = self.write(dataset / PREP / "sub-01/anat/sub-01_desc-brain_mask.nii.gz")
        self.write(dataset / "derivatives/t1/sub-01/anat/sub-01_desc-brain_mask.nii.gz", (3, 4, 6))
        [found] = find()
        assert found.mask(found.echoes()[0][0]) == other

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("no image", "sub-01_mask.nii: this mask cannot be read"),
            (
                "../.git/annex/objects/x\n/annex/objects/MD5E-s9--00.nii\n",
                "not downloaded, a pointer",
            ),
            (None, "not downloaded, a link of git-annex to nothing; run: datalad get"),
        ],
        ids=["damaged", "pointer", "link"],
    )
    @pytest.mark.parametrize("root", ["", f"{PREP}/"])
    def test_one_that_may_fit_is_never_passed_over(self, find, dataset, root, content, says):
        for name in echoes("01", count=1):
            self.write(dataset / name)
        path = dataset / root / "sub-01/anat/sub-01_mask.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.symlink_to("../../.git/annex/objects/MD5E-s9--00.nii")
        else:
            path.write_text(content)
        [found] = find()
        if root:
            with pytest.raises(DataError, match=says):
                found.mask(found.echoes()[0][0])
        else:  # what reads it says what is wrong
            assert found.mask(found.echoes()[0][0]) == path

    def test_none_is_none(self, add, find):
        add(*echoes("01"), "sub-01/anat/sub-01_acq-x_mask.nii.gz")
        found = next(r for r in find() if r.source == "megre")
        assert found.mask(found.echoes()[0][0]) is None

    def test_two_that_fit_equally_are_refused(self, add, find):
        add("sub-01/anat/sub-01_localfield.nii.gz", "sub-01/anat/sub-01_mask.nii.gz")
        add("sub-01/anat/sub-01_desc-brain_mask.nii.gz")
        [found] = find()
        with pytest.raises(DataError, match=r"2 images fit as mask: .*; keep one"):
            found.mask(found.local_field())


class TestBadDatasets:
    def test_no_folder(self, tmp_path):
        with pytest.raises(DataError, match="no such folder"):
            find_recordings(tmp_path / "none", None, None, tmp_path)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, "no BIDS dataset, it has no dataset_description.json"),
            ("{", "not a JSON file"),
            ("[]", "holds a list"),
            ('{"Name": "x"}', "lacks BIDSVersion"),
        ],
    )
    def test_no_description(self, dataset, find, content, says):
        description = dataset / "dataset_description.json"
        description.unlink() if content is None else description.write_text(content)
        with pytest.raises(DataError, match=says):
            find()

    def test_a_description_that_was_not_downloaded(self, dataset, find):
        description = dataset / "dataset_description.json"
        description.unlink()
        description.symlink_to(".git/annex/objects/MD5E-s9--00.json")
        with pytest.raises(DataError, match=r"description.json: not downloaded, .*datalad get"):
            find()

    def test_nothing_to_reconstruct(self, add, find):
        add("sub-01/anat/sub-01_T1w.nii.gz")
        with pytest.raises(DataError, match="nor part-phase MEGRE in sub-01; expected for example"):
            find()

    def test_nothing_of_the_source_that_was_asked_for(self, add, find):
        add(*echoes("01"))
        with pytest.raises(DataError, match=r"no local field .* in sub-01"):
            find(source="localfield")

    @pytest.mark.parametrize(
        ("names", "says"),
        [
            (echoes("01")[1:2] + echoes("01", 3)[4:], "echoes 1, 3 have a phase; they must count"),
            (echoes("01")[1:], "echo 1 has no part-mag; add it beside sub-01_echo-1_part-phase"),
            ([*echoes("01"), echoes("01")[1].removesuffix(".gz")], r"twice: .*nii and .*nii.gz"),
            ([ONE[0], ONE[0].removesuffix(".gz"), ONE[1]], r"T2starw.nii says .*T2starw.nii.gz;"),
            ([ONE[0], echoes("01")[3]], "would both become the map of sub-01; keep one"),
            ([ONE[0], ONE[0].replace("sub-01_", "sub-01_echo-2_"), ONE[1]], "says no echo number"),
            ([CARTESIAN[0]], "echo 1 has no part-imag; add it beside sub-01_echo-1_part-real"),
            ([CARTESIAN[1]], "echo 1 has no part-real; add it beside sub-01_echo-1_part-imag"),
            ([*echoes("01", 1), *CARTESIAN[2:]], "echo 2 has no part-phase"),
            (
                [f"{root}sub-01/anat/sub-01_localfield.nii" for root in ("", f"{PREP}/")],
                r"2 images fit as local field: .* and .*; keep one",
            ),
        ],
        ids=[
            "gap", "no magnitude", "twice", "twice without a number", "two sequences",
            "some with a number", "no imag", "no real", "mixed", "two fields",
        ],
    )  # fmt: skip
    def test_images_that_make_no_recording(self, add, dataset, names, says):
        add(*names, *echoes("02"))
        found = search(dataset)
        [(name, reason)] = found.failures.items()
        assert name == "sub-01"
        assert re.search(says, reason), reason
        assert [r.name for r in found.recordings] == ["sub-02"]


@pytest.fixture
def image(dataset):
    """Return the phase of echo 2 of a session."""
    name = "sub-01_ses-a_echo-2_part-phase_MEGRE.nii.gz"
    entities = {"sub": "01", "ses": "a", "echo": "2", "part": "phase"}
    path = dataset / "sub-01/ses-a/anat" / name
    path.parent.mkdir(parents=True)
    return BidsImage(path, dataset, entities, "MEGRE")


@pytest.fixture
def write(dataset):
    """Return a function that writes a JSON file into the dataset."""

    def write_json(name, content):
        (dataset / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return write_json


class TestMetadata:
    def test_what_is_closer_wins(self, image, write):
        write("MEGRE.json", {"MagneticFieldStrength": 3, "EchoTime": 1, "Units": "arbitrary"})
        write("echo-2_MEGRE.json.bak", {"EchoTime": 2})
        write("sub-01/sub-01_echo-2_MEGRE.json", {"EchoTime": 0.02})
        write("sub-01/sub-01_echo-1_MEGRE.json", {"EchoTime": 0.01})
        write("sub-01/ses-a/anat/sub-01_ses-a_part-phase_MEGRE.json", {"Units": "rad"})
        write("T1w.json", {"MagneticFieldStrength": 7})
        expected = {"MagneticFieldStrength": 3, "EchoTime": 0.02, "Units": "rad"}
        assert load_metadata(image) == expected
        params = load_params_of(image)
        assert (params.echo_time_s, params.field_strength_t) == (0.02, 3.0)

    def test_the_one_of_its_own_name_wins(self, image, write):
        write("MEGRE.json", {"MagneticFieldStrength": 3, "EchoTime": 1})
        anat = "sub-01/ses-a/anat/sub-01_ses-a"
        write(f"{anat}_echo-2_part-phase_MEGRE.json", {"EchoTime": 0.02})
        write(f"{anat}_part-phase_MEGRE.json", {"EchoTime": 0.01, "Units": "rad"})
        assert load_metadata(image) == {"MagneticFieldStrength": 3, "EchoTime": 0.02}

    def test_files_above_the_dataset_do_not_count(self, image, dataset):
        (dataset.parent / "MEGRE.json").write_text('{"EchoTime": 0.02}')
        assert load_metadata(image) == {}

    def test_two_in_one_folder_are_refused(self, image, write):
        write("MEGRE.json", {})
        write("part-phase_MEGRE.json", {})
        with pytest.raises(DataError, match=r"MEGRE.json and part-phase_MEGRE.json both apply"):
            load_metadata(image)

    @pytest.mark.parametrize("content", ["/annex/objects/MD5E-s9--00.json\n", None])
    def test_one_that_was_not_downloaded(self, image, write, dataset, content):
        if content is None:
            (dataset / "MEGRE.json").symlink_to(".git/annex/objects/MD5E-s9--00.json")
        else:
            write("MEGRE.json", content)
        with pytest.raises(DataError, match=r"MEGRE.json: not downloaded, a .*datalad get"):
            load_metadata(image)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ({"EchoTime": "20 ms"}, "EchoTime is '20 ms', expected a number"),
            ("{", "not a JSON file"),
        ],
    )
    def test_nothing_is_guessed(self, image, write, content, says):
        write("MEGRE.json", content)
        with pytest.raises(DataError, match=says):
            load_params_of(image)

    def test_the_direction_that_qsmxt_writes(self, image, write):
        write("MEGRE.json", {"B0_dir": [0, 0.6, 0.8]})
        assert load_params_of(image).b0_direction == (0, 0.6, 0.8)

    @pytest.mark.parametrize(
        ("says", "stated", "unit"),
        [("ppm", None, "ppm"), ("Hz", None, "hz"), ("rad", "rad", "rad"), (None, "hz", "hz")],
    )
    def test_units(self, image, write, says, stated, unit):
        write("MEGRE.json", {} if says is None else {"Units": says})
        assert field_unit(image, stated) == unit

    @pytest.mark.parametrize(
        ("says", "stated", "message"),
        [
            (None, None, "Units are not stated; add ppm, Hz or rad, or pass --units"),
            ("G", None, "Units are 'G', expected one of ppm, ppb, hz, rad/s, tesla, rad"),
            (["ppm"], None, "expected one of ppm"),
            ("ppm", "hz", "says ppm, --units says hz; drop --units"),
        ],
    )
    def test_units_are_never_guessed(self, image, write, says, stated, message):
        write("MEGRE.json", {} if says is None else {"Units": says})
        with pytest.raises(UnitsError, match=message):
            field_unit(image, stated)
