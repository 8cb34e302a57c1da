"""One head gives one map, bit for bit, in all 48 storages, by every way in."""

import json
import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qsm_deploy.runtime as qsm
from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.geometry import Geometry, vector_text
from qsm_deploy.runtime.card.card import METADATA_KEY, GeometryLimits, ReceptiveField, TensorInfo
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.scan.arrays import scan_from_arrays
from qsm_deploy.runtime.scan.units import ppm_per_unit
from tests.runtime.storages import GRIDS, SHAPE, SPREAD, STORAGES, head, require_one, rotated

TIMES_S = (0.004, 0.008, 0.012)
FIELD_STRENGTH_T = 3
UNET = ("--method", "tv-unet")
PATCHES = (*UNET, "--patch", "24", "--overlap", "8")
SPATIAL = (
    *("dim", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def run(folder, name, storage, *flags, with_them=(), fields=None):
    """Return the map of qsm-run in the head's axes, and its report."""
    made = head(name)
    paths = [
        made.save(folder / f"field{n}.nii", storage, field, affine)
        for n, (field, affine) in enumerate(fields or [(made.volumes["field"], None)])
    ]
    words = [*flags, *paths, "-m", made.save(folder / "mask.nii", storage, made.volumes["mask"])]
    for volume in with_them:
        saved = made.save(folder / f"{volume}.nii", storage, made.volumes[volume])
        words += [f"--{volume}", saved]
    if made.stated:
        words += ["--b0-direction", *storage.vector(made.stated)]
    words += ["-o", folder / "chi.nii", "--report", folder / "run.json", "-q", "--force"]
    assert main([str(word) for word in words]) == 0
    image, given = nib.load(folder / "chi.nii"), nib.load(paths[0])
    for entry in SPATIAL:
        np.testing.assert_array_equal(image.header[entry], given.header[entry], entry)
    chi = storage.back(image.get_fdata(dtype=np.float32))
    return chi, json.loads((folder / "run.json").read_text())


def maps(folder, name, storages, *flags, **more):
    return [run(folder, name, storage, *flags, **more)[0] for storage in storages]


@pytest.mark.parametrize("name", GRIDS)
def test_any_geometry(tmp_path, name):
    require_one(maps(tmp_path, name, SPREAD, "--method", "tkd"))


@pytest.mark.parametrize(
    ("flags", "with_them"),
    [
        (("--method", "tv"), ()),
        pytest.param(("--method", "tv", "--robust"), ("magnitude",), marks=pytest.mark.slow),
        (("--method", "medi"), ("magnitude",)),
        pytest.param(("--method", "ilsqr"), (), marks=pytest.mark.slow),
        (("--method", "tikhonov"), ()),
        (UNET, ()),
        (PATCHES, ()),
        ((*PATCHES, "--data-consistency", "auto"), ()),
        ((*UNET, "--data-consistency", "0.3"), ()),
    ],
    ids=lambda value: " ".join(value),
)
def test_any_method(tmp_path, flags, with_them):
    require_one(maps(tmp_path, "tilted, qform", SPREAD, *flags, with_them=with_them))


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("flags", [("--method", "tkd"), UNET, PATCHES], ids=lambda f: " ".join(f))
def test_all_48(tmp_path, name, flags):
    require_one(maps(tmp_path, name, STORAGES, *flags))


def test_metrics_and_field_residual(tmp_path):
    found = [
        run(tmp_path, "thick slices", s, "--method", "tkd", with_them=("truth", "labels"))[1]
        for s in SPREAD
    ]
    assert found[0]["metrics"]["xsim_uniform5"] > 0.2
    for other in found[1:]:
        assert other["metrics"] == found[0]["metrics"]
        assert other["field_residual"] == found[0]["field_residual"]


def orientations(name):
    """Return the fields of a head that is turned between them, and the affine of each."""
    made = head(name)
    spin = rotated("yz", (25, 10), (1, 1, 1))[:3, :3], rotated("x", -20, (1, 1, 1))[:3, :3]
    fields = [(made.volumes["field"], None)]
    for rotation in spin:
        affine = made.affine.copy()
        affine[:3, :3] = rotation @ affine[:3, :3]
        grid = Geometry.from_affine(SHAPE, affine)
        noise = 0.002 * np.random.default_rng(len(fields)).normal(size=SHAPE)
        field = made.volumes["mask"] * (dipole_convolve(made.volumes["truth"], grid) + noise)
        fields.append((field.astype(np.float32), affine))
    return fields


def test_several_orientations(tmp_path):
    require_one(
        maps(tmp_path, "tilted", SPREAD, "--method", "cosmos", fields=orientations("tilted"))
    )


def write_network(path, card):
    """Write a network that no flip and no permutation leaves as it is: a random filter."""
    (volume, *others), one = card.inputs, card.output.shape
    rng = np.random.default_rng(8)
    weights = rng.normal(size=(one[1], volume.shape[1], 3, 3, 3)).astype(np.float32) / 5
    nodes = [helper.make_node("Conv", [volume.name, "weights"], ["seen"], pads=[1] * 6)]
    for tensor in others:  # every input is used, and changes nothing
        nodes += [
            helper.make_node("ReduceMax", [tensor.name], [f"{tensor.name} max"], keepdims=0),
            helper.make_node("Mul", [f"{tensor.name} max", "zero"], [f"{tensor.name} 0"]),
        ]
    ends = ["seen", *(f"{tensor.name} 0" for tensor in others)]
    nodes.append(helper.make_node("Sum", ends, [card.output.name]))
    graph = helper.make_graph(
        nodes,
        "filter",
        [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in card.inputs],
        [helper.make_tensor_value_info(card.output.name, TensorProto.FLOAT, one)],
        [
            onnx.numpy_helper.from_array(weights, "weights"),
            onnx.numpy_helper.from_array(np.float32(0), "zero"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: card.to_json()})
    onnx.save(model, path)
    return path


def volume_of(name, unit, channels=1):
    return TensorInfo(name, unit, ("n", channels, "x", "y", "z"))


@pytest.fixture
def filter_card(card):
    """Return the card of a filter of the local field, for axial scans of these voxels."""
    return replace(card, receptive_field=ReceptiveField(1, 1, 1.0))


def unrolled(card):
    return replace(
        card,
        pipeline="lpcnn",
        patchable="split",
        inputs=(volume_of("prior_input", "1"),),
        output=volume_of("prior_output", "1"),
        constants={"alpha": 1.5, "iterations": 2},
        normalisation={"chi_mean": 0.0, "chi_std": 0.05},
    )


def of_phase(card):
    inputs = (volume_of("phase_rad", "rad"), volume_of("mask", "1"))
    time = TensorInfo("echo_time_s", "s", (1,))
    return replace(card, task="phase->chi", inputs=(*inputs, time))


@pytest.mark.parametrize("count", [1, 3])
def test_a_network_of_several_orientations(tmp_path, filter_card, count):
    model = write_network(tmp_path / "lpcnn.onnx", unrolled(filter_card))
    fields = orientations("tilted")[:count]
    require_one(maps(tmp_path, "tilted", SPREAD, model, fields=fields))


@pytest.mark.parametrize("name", ["tilted", "tilted, qform", "45 degrees", "thick slices"])
def test_a_network_of_axial_scans(tmp_path, filter_card, name):
    limits = GeometryLimits((5.0, 5.0, 5.0), 0.1, (0.0, 0.0, 1.0), 2.0)
    card = replace(filter_card, geometry=limits)
    model = write_network(tmp_path / "axial.onnx", card)
    _, report = run(tmp_path, name, SPREAD[0], model)
    assert report["grid"]["turned_deg"] > 13
    require_one(maps(tmp_path, name, SPREAD, model, "--data-consistency", "0.3"))


def test_a_network_of_the_phase(tmp_path, filter_card):
    model = write_network(tmp_path / "phase.onnx", of_phase(filter_card))
    scale = ppm_per_unit("rad", echo_time_s=0.02, field_strength_t=FIELD_STRENGTH_T)
    turned = np.exp(1j * head("tilted").volumes["field"] / scale)
    fields = [(np.angle(turned).astype(np.float32), None)]
    flags = (model, "--echo-time", "0.02", "--field-strength", FIELD_STRENGTH_T, "--patch", "16")
    require_one(maps(tmp_path, "tilted", SPREAD, *flags, fields=fields))


@pytest.mark.parametrize("known", ["letters", "affine"])
def test_arrays(known):
    made = head("tilted")
    found = []
    for storage in STORAGES:
        axes = storage.letters if known == "letters" else storage.affine(made.affine, SHAPE)
        field, mask = storage.of(made.volumes["field"]), storage.of(made.volumes["mask"])
        chi = qsm.reconstruct(
            field,
            mask,
            voxel_size_mm=storage.sizes(made.grid.voxel_size_mm),
            b0_direction=storage.vector(made.grid.b0_direction),
            axes=axes,
            method="tkd",
        )
        assert chi.shape == field.shape
        found.append(storage.back(chi))
    require_one(found)


def test_arrays_whose_axes_nobody_knows_are_not_flipped():
    """Only the axis nearest to B0 is sure, so that the others keep their order."""
    scan = scan_from_arrays(
        np.pad(head("tilted").volumes["field"], ((0, 0), (1, 0), (2, 0))),
        None,
        voxel_size_mm=(1, 2, 3),
        b0_direction=(0.1, -0.9, 0.2),
    )
    assert (scan.axes.order, scan.axes.flipped) == ((0, 2, 1), (False,) * 3)
    assert scan.geometry.voxel_size_mm == (1, 3, 2)


def test_files_in_an_array_out(tmp_path):
    made, found = head("thick slices"), []
    for storage in SPREAD:
        names = {"field": "field", "mask": "mask"}
        paths = {n: made.save(tmp_path / f"{n}.nii", storage, made.volumes[n]) for n in names}
        result = qsm.run(paths["field"], mask=paths["mask"], method="tkd")
        np.testing.assert_array_equal(
            result.scan.measured[0], storage.of(made.volumes["field"] * made.volumes["mask"])
        )
        assert result.scan.geometry.shape == result.chi_ppm.shape
        found.append(storage.back(result.chi_ppm))
    require_one(found)


def write_dataset(root, name, storage, masked):
    """Write a dataset with a local field of one subject, three bipolar echoes of another."""
    made, brain = head(name), root / "derivatives/brain"

    def write(place, data, sidecar):
        made.save(place.with_suffix(".nii"), storage, data)
        place.with_suffix(".json").write_text(json.dumps(sidecar))

    field, mask = made.volumes["field"], made.volumes["mask"]
    for subject in masked:
        stem = brain / f"sub-{subject}/anat/sub-{subject}"
        write(stem.with_name(f"{stem.name}_desc-brain_mask"), mask, {"Type": "Brain"})
    write(brain / "sub-01/anat/sub-01_localfield", field, {"Units": "ppm"})
    signal, said = made.volumes["magnitude"], {"EchoTime": TIMES_S[0]}
    write(root / "sub-01/anat/sub-01_part-mag_T2starw", signal, said)
    x, y, z = np.indices(SHAPE) / 15 - 1
    total = field + 0.2 * x + 0.1 * (x * x - y * y) + 0.1 * y * z
    for echo, time in enumerate(TIMES_S, 1):
        radians = total / ppm_per_unit("rad", echo_time_s=time, field_strength_t=FIELD_STRENGTH_T)
        said = {"EchoTime": time, "MagneticFieldStrength": FIELD_STRENGTH_T}
        stem = f"sub-02/anat/sub-02_echo-{echo}_part"
        offset = 0.5 + (echo % 2) * (0.1 + 0.2 * x)
        phase = np.angle(np.exp(1j * (radians + offset))).astype(np.float32)
        write(root / f"{stem}-phase_MEGRE", phase, said | {"Units": "rad"})
        write(root / f"{stem}-mag_MEGRE", signal * np.float32(np.exp(-time / 0.03)), said)
    for folder, kind in ((root, "raw"), (brain, "derivative")):
        said = {"Name": "A head", "BIDSVersion": "1.10.0", "DatasetType": kind}
        (folder / "dataset_description.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        ("tilted", ("01",)),
        pytest.param("thick slices, qform", ("01", "02"), marks=pytest.mark.slow),
    ],
)
def test_datasets(tmp_path, name, masked):
    found = []
    for storage in SPREAD:
        root = tmp_path / storage.letters
        write_dataset(root, name, storage, masked)
        assert main(["--method", "medi", "--bids", str(root)]) == 0
        paths = sorted(root.glob("derivatives/qsm-deploy/sub-*/anat/*_Chimap.nii.gz"))
        found.append([storage.back(nib.load(p).get_fdata(dtype=np.float32)) for p in paths])
    for of_one in zip(*found, strict=True):
        require_one(of_one)
    assert len(found[0]) == 2


def test_directions_are_named_in_stored_axes(tmp_path, capsys):
    """A header that has B0 along the head's first axis is doubted: it lay along the third."""
    made = head("upright")
    for storage in SPREAD:
        paths = [
            made.save(tmp_path / f"{n}.nii", storage, made.volumes[n]) for n in ("field", "mask")
        ]
        stated = storage.vector((1.0, 0.0, 0.0))
        words = [paths[0], "-m", paths[1], "-o", tmp_path / "chi.nii", "--force"]
        assert main([*map(str, (*words, "--method", "tkd", "--b0-direction", *stated))]) == 0
        said = capsys.readouterr().err
        assert f"B0 direction {vector_text(stated)} from the command line, not " in said
        (seen,) = re.findall(r"lay along \((.*)\), not along \((.*)\) \(voxel axes\)", said)
        found, named = (np.abs([float(x) for x in numbers.split(",")]) for numbers in seen)
        np.testing.assert_array_equal(named, np.abs(stated))
        np.testing.assert_array_equal(found, np.abs(storage.vector((0, 0, 1))))


def test_a_part_lies_where_it_lay():
    made = head("tilted")
    box = slice(3, 20), slice(5, 30), slice(7, 25)
    scan = scan_from_arrays(
        made.volumes["field"],
        None,
        voxel_size_mm=(5, 5, 5),
        b0_direction=(0, 0, 1),
        axes=made.affine,
    )
    part = scan.cut(box)
    np.testing.assert_allclose(part.affine @ (0, 0, 0, 1), scan.affine @ (3, 5, 7, 1))
    np.testing.assert_array_equal(part.affine[:, :3], scan.affine[:, :3])
