"""Two-prior projection on a GPU; never run on one.

The CPU's is :mod:`qsm_deploy.runtime.local_field.background.two_prior`. All iterations are enqueued
before the first is waited for.
"""

import math
from dataclasses import asdict

import numpy as np

from qsm_deploy.kernels.cuda_abi import DOT_WORKSPACE_BYTES
from qsm_deploy.kernels.cuda_library import DipoleOperator, PatchBox
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.kernels.inversion.grid import PaddedBox
from qsm_deploy.runtime.gpu.box import DeviceBox
from qsm_deploy.runtime.gpu.device import holding, send
from qsm_deploy.runtime.gpu.dipole import DeviceVectors, conjugate_gradients
from qsm_deploy.runtime.gpu.layout import DOUBLE, FLOAT, Layout
from qsm_deploy.runtime.gpu.run import Place
from qsm_deploy.runtime.local_field.background.removal import Task
from qsm_deploy.runtime.local_field.background.two_prior import TwoPrior

NUMBERS = 3  # dot products that are needed at the same time
VOLUMES = ("x", "residual", "direction", "image", "between", "inverse prior")


class TwoPriorOnGpu(TwoPrior):
    """The projection on a GPU; all calls must come from the thread that opened it.

    Parameters
    ----------
    place
        Where.
    method
        Its parameters.
    """

    _place: Place

    def __init__(self, place: Place, method: TwoPrior | None = None) -> None:
        super().__init__(**asdict(method or TwoPrior()))
        object.__setattr__(self, "_place", place)

    def layout(self, grid: PaddedBox) -> Layout:
        """Return what it needs on the GPU."""
        voxels = math.prod(grid.geometry.shape)
        workspace = self._place.library.dipole_workspace_bytes(DipoleOperator(grid.geometry))
        return Layout(
            dict.fromkeys(VOLUMES, FLOAT * voxels)
            | {"trusted": voxels, "workspace": workspace}
            | {"sums": NUMBERS * DOUBLE, "dot": DOT_WORKSPACE_BYTES}
        )

    def sources(self, task: Task, grid: PaddedBox, prior: Volume, known: Volume) -> Volume:
        """Return the sources inside and outside [ppm]; as the CPU's."""
        device, library = self._place.device, self._place.library
        shape, dipole = grid.geometry.shape, DipoleOperator(grid.geometry)
        layout = self.layout(grid)
        precision = 1 / self.noise_ppm**2
        with holding(device) as holdings:
            at = layout.at(holdings.buffer(layout.total))
            stream = holdings.stream()
            vectors = DeviceVectors(library, math.prod(shape), at["sums"], at["dot"], stream)
            workspace = at["workspace"], layout.sizes["workspace"]
            box = DeviceBox(library, grid, at["trusted"], at["trusted"], *workspace, stream)
            between = at["between"]

            def scaled(x: int, to: int) -> None:
                whole, inverse = PatchBox(shape, (0, 0, 0), shape), at["inverse prior"]
                library.patch_finish(whole, x, to, weight=inverse, stream=stream)

            def normal(u: int, image: int) -> None:
                scaled(u, image)
                box.apply(dipole, image, image)
                box.masked(image, between)
                box.apply(dipole, between, between)
                scaled(between, image)
                vectors.combine(1, u, precision, image)

            sources = {
                "image": np.float32(precision) * known,
                "inverse prior": 1 / prior,
                "trusted": grid.embed_mask(task.trusted).view(np.uint8),
            }
            kept = [send(device, at[name], array, stream) for name, array in sources.items()]
            x, residual, direction, image = (at[name] for name in VOLUMES[:4])
            box.apply(dipole, image, image)
            for start in (residual, direction):
                scaled(image, start)
            device.zero(x, layout.sizes["x"], stream)
            steps = [
                holdings.event(stream)
                for _ in conjugate_gradients(normal, self.iterations, vectors, at)
            ]
            scaled(x, between)
            found: Volume = device.pinned(shape, np.float32)
            device.copy_out(found, between, stream)
            for step in steps:
                device.finish(step)
                task.done()
        del kept  # the GPU has read it
        return found
