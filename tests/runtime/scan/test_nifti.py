"""NIfTI in and out: geometry bit for bit, every dialect read, everything damaged refused."""

import gzip
import itertools
import os
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from qsm_deploy.kernels.errors import DataError, GeometryError
from qsm_deploy.runtime.scan import gzip_members
from qsm_deploy.runtime.scan.axes import Axes
from qsm_deploy.runtime.scan.nifti import load_on_grid, load_volume, nifti_bytes, on_grid

SHAPE = (7, 5, 6)
VALUES = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xz", [25, 10], degrees=True).as_matrix() @ np.diag(
    [0.82, -0.88, 1.99]
)
OBLIQUE[:3, 3] = -80, 90, -40
SPATIAL = [
    *("dim_info", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "map.nii"


def image_bytes(values=VALUES, affine=OBLIQUE, kind=nib.Nifti1Image, **fields) -> bytearray:
    """Return a NIfTI file whose header fields are set as given, valid or not."""
    image = kind(values, affine)
    raw = bytearray(image.to_bytes())
    header = image.header.__class__(bytes(raw[: image.header.sizeof_hdr]), check=False)
    for name, value in fields.items():
        header[name] = value
    raw[: image.header.sizeof_hdr] = header.binaryblock
    return raw


def test_what_is_written_is_read_back(path):
    for compress in (True, False):
        raw = nifti_bytes(VALUES, OBLIQUE, description="a map", compress=compress)
        assert raw.startswith(b"\x1f\x8b") == compress
        path.write_bytes(raw)
        volume = load_volume(path)
        np.testing.assert_array_equal(volume.data, VALUES)
        assert volume.data.dtype == np.float32
        assert volume.data.flags.c_contiguous
        np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-5)
        assert volume.header["descrip"].item() == b"a map"
        assert volume.header.get_xyzt_units()[0] == "mm"
        assert (volume.header["qform_code"], volume.header["sform_code"]) == (1, 1)
        np.testing.assert_allclose(volume.geometry.voxel_size_mm, (0.82, 0.88, 1.99), 1e-4)


def test_the_same_volume_gives_the_same_bytes():
    assert nifti_bytes(VALUES, OBLIQUE) == nifti_bytes(VALUES, OBLIQUE)


def test_a_long_or_foreign_description_is_cut_to_what_fits(path):
    path.write_bytes(nifti_bytes(VALUES, OBLIQUE, description="µ" * 100))
    assert load_volume(path).header["descrip"].item() == b"?" * 79


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 2), (2, 4), (0, 0), (3, 3)])
def test_the_geometry_survives_bit_for_bit(path, kind, codes):
    image = kind(VALUES, OBLIQUE)
    other = OBLIQUE.copy()
    other[:3, 3] += 1 / 3
    image.set_qform(other, codes[0])
    image.set_sform(OBLIQUE, codes[1])
    image.header.set_xyzt_units("unknown" if codes[1] == 4 else "mm", "msec")
    image.header.set_dim_info(freq=1, phase=0, slice=2)
    path.write_bytes(image.to_bytes())
    source = load_volume(path)
    aligned = image.header.get_qform() if codes == (2, 4) else image.header.get_best_affine()
    np.testing.assert_array_equal(source.affine, aligned)

    path.write_bytes(nifti_bytes(2 * VALUES, source.affine, like=source.header))
    result = load_volume(path)
    for name in [*SPATIAL, "pixdim"]:
        # the result is NIfTI-1: of a NIfTI-2 header's doubles the nearest floats
        expected = np.atleast_1d(source.header[name].astype(result.header[name].dtype))[:4]
        seen = np.atleast_1d(result.header[name])[:4]
        np.testing.assert_array_equal(seen, expected, err_msg=name)
    np.testing.assert_array_equal(result.data, 2 * VALUES)


def test_the_type_is_the_arrays_own_whatever_the_source(path):
    scaled = nib.Nifti1Image(VALUES, OBLIQUE)
    scaled.header.set_data_dtype(np.int16)
    path.write_bytes(scaled.to_bytes())
    source = load_volume(path)
    assert source.header["datatype"] == 4
    path.write_bytes(nifti_bytes(VALUES, source.affine, like=source.header))
    result = load_volume(path)
    assert result.header.get_data_dtype() == np.float32
    np.testing.assert_array_equal(result.data, VALUES)


def test_stored_integers_are_scaled(path):
    stored = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) - 50
    path.write_bytes(image_bytes(stored, scl_slope=0.125, scl_inter=-3))
    np.testing.assert_array_equal(load_volume(path).data, stored * 0.125 - 3)
    path.write_bytes(image_bytes(stored, scl_slope=0, scl_inter=7))  # no scaling, says NIfTI
    np.testing.assert_array_equal(load_volume(path).data, stored)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders_and_all_plain_types(path, dtype, order):
    values = (10 * np.abs(VALUES)).astype(dtype)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(dtype)
    path.write_bytes(nib.Nifti1Image(values, OBLIQUE, header).to_bytes())
    volume = load_volume(path)
    assert volume.header.endianness == order
    np.testing.assert_array_equal(volume.data, values)
    path.write_bytes(nifti_bytes(VALUES, volume.affine, like=volume.header))
    np.testing.assert_array_equal(load_volume(path).affine, volume.affine)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("extra", [(1,), (1, 1, 1)])
def test_trailing_axes_of_one_are_dropped(path, kind, extra):
    path.write_bytes(kind(VALUES.reshape(SHAPE + extra), OBLIQUE).to_bytes())
    source = load_volume(path)
    np.testing.assert_array_equal(source.data, VALUES)
    path.write_bytes(nifti_bytes(VALUES, source.affine, like=source.header))
    assert load_volume(path).header.get_data_shape() == SHAPE


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 1), (1, 5, 6), (7, 5, 6, 2), (7, 5, 6, 1, 3)])
def test_anything_but_one_volume_is_refused(path, shape):
    path.write_bytes(nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)).to_bytes())
    with pytest.raises(GeometryError, match="one 3-D volume") as caught:
        load_volume(path)
    assert str(shape) in str(caught.value)


def test_colours_and_complex_numbers_are_refused(path):
    colours = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    for values in (colours, VALUES.astype(np.complex64), VALUES.astype(np.complex128)):
        path.write_bytes(nib.Nifti1Image(values, OBLIQUE).to_bytes())
        with pytest.raises(DataError, match=r"NIfTI datatype \d+.*real-valued"):
            load_volume(path)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 200, 347, 352, 353, -1])
def test_a_truncated_file_is_refused(path, compress, keep):
    whole = nifti_bytes(VALUES, OBLIQUE, compress=False)
    # the .nii.gz is cut in the compressed stream at the same share of its length
    packed = gzip.compress(whole)
    share = keep if keep <= 0 or not compress else keep * len(packed) // len(whole)
    path.write_bytes((packed if compress else whole)[:share])
    with pytest.raises(DataError, match=r"truncated|not a single-file NIfTI"):
        load_volume(path)


def test_a_damaged_archive_is_refused(path):
    packed = bytearray(nifti_bytes(VALUES, OBLIQUE))
    for position in (len(packed) // 2, len(packed) - 6):  # content, checksum
        damaged = packed.copy()
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="truncated or damaged"):
            load_volume(path)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("rest", [b"", b"extra", bytes(512), b"\x1f"])
def test_trailing_bytes_do_no_harm(path, compress, rest):
    path.write_bytes(nifti_bytes(VALUES, OBLIQUE, compress=compress) + rest)
    volume = load_volume(path)
    np.testing.assert_array_equal(volume.data, VALUES)
    what = "the compressed data" if compress else "the voxels"
    assert volume.notes == (
        (f"{path}: {len(rest)} bytes after {what} were ignored",) if rest else ()
    )


def test_several_members_are_one_file(path):
    whole = nifti_bytes(VALUES, OBLIQUE, compress=False)
    cuts = [whole[:100], whole[100:400], whole[400:]]
    path.write_bytes(bytes(40).join(gzip.compress(piece) for piece in cuts))
    np.testing.assert_array_equal(load_volume(path).data, VALUES)
    packed = bytearray(path.read_bytes())
    packed[-3] ^= 1  # the length of the last
    path.write_bytes(packed)
    with pytest.raises(DataError, match="truncated or damaged"):
        load_volume(path)


def test_a_bomb_takes_no_more_memory_than_its_header_announces_and_is_not_read_on(path):
    whole = nifti_bytes(VALUES, OBLIQUE, compress=False)
    tracemalloc.start()
    path.write_bytes(gzip.compress(whole + bytes(gzip_members.MOST_AFTER), 9))
    tracemalloc.reset_peak()
    np.testing.assert_array_equal(load_volume(path).data, VALUES)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    path.write_bytes(gzip.compress(whole + bytes(gzip_members.MOST_AFTER + 1), 9))
    tracemalloc.reset_peak()
    with pytest.raises(DataError, match="a file that unpacks to far more"):
        load_volume(path)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_an_offset_of_zero_means_after_the_header(path, kind):
    path.write_bytes(image_bytes(kind=kind, vox_offset=0))
    volume = load_volume(path)
    np.testing.assert_array_equal(volume.data, VALUES)
    assert "vox_offset is 0" in volume.notes[0]
    assert nib.load(path).header["vox_offset"] == 0


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("offset", [0, 352])
@pytest.mark.parametrize("order", ["<", ">"])
def test_an_offset_that_forgets_an_extension_is_refused(path, kind, offset, order):
    image = kind(VALUES, OBLIQUE, kind.header_class(endianness=order))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"words" * 9))
    raw = bytearray(image.to_bytes())
    size = image.header.sizeof_hdr
    header = image.header_class(bytes(raw[:size]), endianness=order, check=False)
    assert header["vox_offset"] > size + 4
    header["vox_offset"] = offset and size + 4
    raw[:size] = header.binaryblock
    path.write_bytes(raw)
    with pytest.raises(DataError, match="where an extension of 64 bytes lies"):
        load_volume(path)


def test_an_offset_of_zero_and_bytes_too_many_are_refused(path):
    path.write_bytes(image_bytes(vox_offset=0) + bytes(64))
    with pytest.raises(DataError, match=r"vox_offset is 0.*, but 64 bytes after the voxels follow"):
        load_volume(path)


@pytest.mark.parametrize("offset", [1, 100, 348, 351, 352.5, np.inf, 1e30])
def test_an_offset_within_the_header_or_beyond_all_files_is_refused(path, offset):
    path.write_bytes(image_bytes(vox_offset=offset))
    with pytest.raises(DataError, match="vox_offset is"):
        load_volume(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (bytes(128) + b"DICM" + bytes(400), "a DICOM image; pass its folder: qsm-run --dicom"),
        (b"NRRD0004\ntype: float", "an NRRD file; convert it to NIfTI"),
        (b"\x89HDF\r\n\x1a\n" + bytes(500), "an HDF5 file"),
        (b"\x93NUMPY" + bytes(500), "a NumPy array"),
        (b'{"EchoTime": 0.02}', "JSON; pass the .nii or .nii.gz that it lies beside"),
        (b"\x89PNG\r\n", "a PNG picture"),
        (b"MATLAB 5.0 MAT-file" + bytes(500), "a MATLAB file"),
        (nib.AnalyzeHeader().binaryblock, "an Analyze header"),
        (nib.nifti1.Nifti1PairHeader().binaryblock, "the header of a NIfTI pair"),
        (b"/annex/objects/MD5E-s9--x.nii.gz\n", "datalad get"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_else_is_handed_over_is_named(path, content, says, packed):
    if packed and ("get" in says or "pull" in says):
        packed = False
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=says):
        load_volume(path)


def test_the_content_decides_not_the_name(tmp_path):
    for name, compress in (("plain.nii.gz", False), ("packed.nii", True), ("neither.txt", True)):
        (tmp_path / name).write_bytes(nifti_bytes(VALUES, OBLIQUE, compress=compress))
        np.testing.assert_array_equal(load_volume(tmp_path / name).data, VALUES)


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "empty.nii").touch()
    for path, message in [
        (tmp_path, "a folder"),
        (tmp_path / "gone.nii", "no such file"),
        (tmp_path / "empty.nii" / "map.nii", "no such file"),
        (tmp_path / ("long" * 100), "no such file"),
        (tmp_path / "empty.nii", "not a single-file NIfTI"),
    ]:
        with pytest.raises(DataError, match=message):
            load_volume(path)


@settings(deadline=None)
@given(st.binary(max_size=600))
def test_garbage_is_refused(tmp_path_factory, garbage):
    path = tmp_path_factory.getbasetemp() / f"garbage-{os.getpid()}.nii"
    path.write_bytes(garbage)
    with pytest.raises(DataError):
        load_volume(path)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 347), st.integers(0, 255), st.sampled_from([nib.Nifti1Image, nib.Nifti2Image])
)
def test_a_damaged_header_is_read_or_refused(tmp_path_factory, position, value, kind):
    raw = image_bytes(kind=kind)
    raw[position] = value
    path = tmp_path_factory.getbasetemp() / f"damaged-{os.getpid()}.nii"
    path.write_bytes(raw)
    try:
        volume = load_volume(path)
    except DataError:
        return
    assert volume.data.size > 0
    assert volume.geometry.shape == volume.data.shape


@pytest.mark.parametrize("size", [0, -1, np.nan, np.inf])
@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_an_impossible_voxel_size_is_refused(path, size, axis, kind):
    pixdim = nib.Nifti1Image(VALUES, OBLIQUE).header["pixdim"].copy()
    pixdim[axis] = size
    path.write_bytes(image_bytes(kind=kind, pixdim=pixdim))
    with pytest.raises(GeometryError, match="voxel size"):
        load_volume(path)


@pytest.mark.parametrize("name", ["qform_code", "sform_code"])
@pytest.mark.parametrize("code", [-1, 6, 99])
def test_a_meaningless_form_code_is_refused(path, name, code):
    path.write_bytes(image_bytes(**{name: code}))
    with pytest.raises(GeometryError, match=f"{name} is {code}"):
        load_volume(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"srow_x": np.nan}, "finite"),
        ({"srow_z": 0}, "singular"),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 2}, "header"),
        ({"sform_code": 0, "qform_code": 1, "qoffset_x": np.inf}, "finite"),
        ({"datatype": 1234}, "datatype 1234"),
        ({"dim": [3, 7, -5, 6, 1, 1, 1, 1]}, "one 3-D volume"),
        ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, "truncated"),
        ({"dim": [9, 7, 5, 6, 1, 1, 1, 1]}, "map.nii"),
        ({"dim": [-3, 7, 5, 6, 1, 1, 1, 1]}, "map.nii"),
        ({"vox_offset": 1e9}, "truncated"),
        ({"vox_offset": np.nan}, "map.nii"),
        ({"vox_offset": -352}, "map.nii"),
        ({"scl_slope": 2, "scl_inter": np.inf}, "map.nii"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_an_impossible_header_is_refused(path, fields, message):
    path.write_bytes(image_bytes(**fields))
    with pytest.raises(DataError, match=message):
        load_volume(path)


def test_values_beyond_float32_arrive_as_inf(path):
    values = VALUES.astype(np.float64)
    values[0, 0, 0] = 1e300
    path.write_bytes(nib.Nifti1Image(values, OBLIQUE).to_bytes())
    assert load_volume(path).data[0, 0, 0] == np.inf


def test_volumes_of_one_scan_share_a_grid(tmp_path):
    first, second = tmp_path / "field.nii", tmp_path / "mask.nii"
    first.write_bytes(nifti_bytes(VALUES, OBLIQUE))
    field = load_volume(first)

    def apart(mm: float) -> np.ndarray:
        moved = OBLIQUE.copy()
        moved[1, 3] += mm
        return moved

    second.write_bytes(nifti_bytes(np.ones(SHAPE, np.uint8), apart(0.001)))
    assert load_on_grid(second, field).data.all()
    second.write_bytes(nifti_bytes(VALUES, apart(0.5)))
    with pytest.raises(GeometryError, match=r"mask\.nii.*field\.nii disagree.*0\.5 mm apart"):
        load_on_grid(second, field)
    turned = OBLIQUE.copy()
    turned[0, 0] += 0.05  # agrees at the first voxel, not at the last
    second.write_bytes(nifti_bytes(VALUES, turned))
    with pytest.raises(GeometryError, match=r"0\.(3|296) mm apart"):
        load_on_grid(second, field)
    second.write_bytes(nifti_bytes(VALUES[:-1], OBLIQUE))
    with pytest.raises(GeometryError, match=r"\(6, 5, 6\).*\(7, 5, 6\)"):
        load_on_grid(second, field)


@pytest.mark.parametrize(
    "axes",
    [
        Axes(order, flipped)
        for order in itertools.permutations(range(3))
        for flipped in itertools.product((False, True), repeat=3)
    ],
    ids=str,
)
def test_a_volume_of_the_same_grid_in_another_order_is_turned_into_it(tmp_path, axes):
    first, second = tmp_path / "field.nii", tmp_path / "mask.nii"
    first.write_bytes(nifti_bytes(VALUES, OBLIQUE))
    second.write_bytes(nifti_bytes(axes.turn(VALUES), axes.affine(OBLIQUE, SHAPE)))
    found = load_on_grid(second, load_volume(first))
    np.testing.assert_array_equal(found.data, VALUES)
    np.testing.assert_allclose(found.affine, OBLIQUE, atol=1e-4)
    assert on_grid(second, first)


def test_real_scanner_files_are_read(shared):
    phase = load_volume(shared / "data" / "invivo_haemorrhage" / "tissue_phase_rad.nii.gz")
    mask = load_on_grid(shared / "data" / "invivo_haemorrhage" / "mask.nii.gz", phase)
    assert set(np.unique(mask.data)) == {0, 1}
    np.testing.assert_allclose(phase.geometry.voxel_size_mm, (0.86, 0.86, 2), atol=0.01)
