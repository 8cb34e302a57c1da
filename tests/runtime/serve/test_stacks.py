"""Where images lie: any orientation, any order, and everything that cannot be a volume."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from qsm_deploy.kernels.errors import DataError, GeometryError
from qsm_deploy.runtime.serve.stacks import require_same_grid, stack_images

TILT = Rotation.from_euler("xyz", (12, -25, 8), degrees=True).as_matrix()
# rows are the LPS directions in which x, y and z of the pixels grow
ORIENTATIONS = {
    "axial": np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    "coronal": np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]),
    "sagittal": np.array([[0, 1, 0], [0, 0, -1], [1, 0, 0]]),
    "axial, feet first": np.array([[1, 0, 0], [0, 1, 0], [0, 0, -1]]),
}
VOXEL, CENTRE = (1.1, 0.9, 2.5), (13.0, -24.0, 5.0)


@pytest.fixture(params=[(name, swap) for name in ORIENTATIONS for swap in (False, True)])
def axes(request):
    """Return oblique directions, with the phase direction swapped with the read direction or not.

    Swapped in-plane directions make the three left-handed.
    """
    name, swap = request.param
    axes = ORIENTATIONS[name] @ TILT
    return axes[[1, 0, 2]] if swap else axes


@pytest.mark.parametrize("slab", [False, True])
def test_voxels_lie_where_the_headers_say(codec_images, local_field, axes, slab):
    stack = stack_images(
        codec_images(local_field, axes=axes, voxel=VOXEL, centre=CENTRE, slab=slab)
    )
    np.testing.assert_array_equal(stack.volume(), local_field)
    middle = (np.array(local_field.shape) - 1) / 2
    for index in np.ndindex(2, 2, 2):
        voxel = np.array(index) * (np.array(local_field.shape) - 1)
        lps = np.array(CENTRE) + ((voxel - middle) * VOXEL) @ axes
        ras = lps * [-1, -1, 1]
        np.testing.assert_allclose((stack.affine @ [*voxel, 1])[:3], ras, atol=1e-4)
    np.testing.assert_allclose(stack.geometry.voxel_size_mm, VOXEL, rtol=1e-5)
    np.testing.assert_allclose(stack.geometry.b0_direction, axes[:, 2], atol=1e-6)


def test_pixels_that_the_host_turned_are_where_the_attributes_say(codec_images, local_field):
    axes = ORIENTATIONS["sagittal"] @ TILT
    names = ("ImageRowDir", "ImageColumnDir", "ImageSliceNormDir")
    stated = {name: [str(v) for v in axis] for name, axis in zip(names, axes, strict=True)}
    turned = axes[[1, 0, 2]]  # what the acquisition had
    images = codec_images(local_field, axes=turned, voxel=(1, 1, 2), **stated)
    np.testing.assert_allclose(
        stack_images(images).affine,
        stack_images(codec_images(local_field, axes=axes, voxel=(1, 1, 2))).affine,
        atol=1e-5,
    )


def test_a_slab_whose_extent_is_that_of_one_partition(codec_images, local_field):
    volume = local_field.transpose()  # twelve partitions
    whole, part = (codec_images(volume, slab=True, voxel=(1, 1, 1.5)) for _ in range(2))
    part[0].head.field_of_view[2] = 1.0
    np.testing.assert_allclose(stack_images(whole).geometry.voxel_size_mm, (1, 1, 1.5))
    np.testing.assert_allclose(stack_images(part).geometry.voxel_size_mm, (1, 1, 1))
    centre = np.append((np.array(volume.shape) - 1) / 2, 1)
    for images in (whole, part):
        np.testing.assert_allclose((stack_images(images).affine @ centre)[:3], (-3, 4, 5))


class TestRefused:
    @pytest.fixture
    def images(self, codec_images, local_field):
        return codec_images(local_field)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda i: i.pop(2), "one is missing"),
            (lambda i: i.append(i[0]), "same place"),
            (lambda i: i[3].head.position.__setitem__(0, 3.2), "shifted by 0.2 mm"),
            (lambda i: i[3].head.position.__setitem__(0, float("nan")), "not finite"),
            (lambda i: i[3].head.read_dir.__setitem__(0, 0.5), "no direction"),
            (lambda i: i[3].head.slice_dir.__setitem__(slice(3), (0, 1, 0)), "turned"),
            (lambda i: i[0].head.field_of_view.__setitem__(0, 0), "field of view"),
            (lambda i: i[0].attributes.update(ImageRowDir=["a", "b", "c"]), "not three numbers"),
            (lambda i: i[0].attributes.update(ImageRowDir=["1", "0"]), "no direction"),
            (lambda i: [a.head.phase_dir.__setitem__(slice(3), (1, 0, 0)) for a in i], "singular"),
        ],
    )
    def test_images_that_are_no_volume(self, images, change, match):
        change(images)
        with pytest.raises(GeometryError, match=match):
            stack_images(images)

    def test_mixed_matrix_sizes(self, codec_images, local_field):
        mixed = codec_images(local_field)[:-1] + codec_images(local_field[1:])[-1:]
        with pytest.raises(GeometryError, match=r"images of \(1., 10, 1\) and \(1., 10, 1\)"):
            stack_images(mixed)

    def test_two_slabs(self, codec_images, local_field):
        with pytest.raises(GeometryError, match="2 slabs of 8 partitions"):
            stack_images(2 * codec_images(local_field, slab=True))

    def test_a_slab_without_thickness(self, codec_images, local_field):
        images = codec_images(local_field, slab=True)
        images[0].head.field_of_view[2] = -3
        with pytest.raises(GeometryError, match="every extent must be positive"):
            stack_images(images)

    def test_one_slice(self, images):
        with pytest.raises(DataError, match="one slice in series 1, echo 0"):
            stack_images(images[:1])

    def test_volumes_apart(self, codec_images, local_field):
        here = stack_images(codec_images(local_field))
        require_same_grid(here, stack_images(codec_images(local_field, slab=True, series=2)))
        with pytest.raises(GeometryError, match="lie 1 mm apart"):
            require_same_grid(here, stack_images(codec_images(local_field, centre=(4, -4, 5))))
        with pytest.raises(GeometryError, match=r"12, 10, 8.* voxels, .*11, 10, 8"):
            require_same_grid(here, stack_images(codec_images(local_field[1:])))
