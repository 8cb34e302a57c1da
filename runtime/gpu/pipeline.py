"""The stages of a network, from what was measured to a susceptibility map, one after the other.

Run on an H100 with PyTorch as the engine.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qsm_deploy.kernels.cuda_library import DipoleOperator, PatchBox
from qsm_deploy.kernels.inversion.field_noise import alpha_of_noise
from qsm_deploy.runtime.card.card import Anchor
from qsm_deploy.runtime.gpu.device import Holdings
from qsm_deploy.runtime.gpu.dipole import closed_form, iterative_form
from qsm_deploy.runtime.gpu.engines.inference import DeviceSession
from qsm_deploy.runtime.gpu.layout import FIELD, FLOAT, SIGNED, WORKERS, DeviceWorkload
from qsm_deploy.runtime.gpu.patches import DevicePatches, Worker
from qsm_deploy.runtime.gpu.prior_maps import DevicePriors
from qsm_deploy.runtime.gpu.run import DeviceRun, Place
from qsm_deploy.runtime.reconstruction.memory import PAD_VOXELS
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.reconstruction.pipeline import network_input
from qsm_deploy.runtime.reconstruction.prior_maps import field_noise_ppm, variation_steps


@dataclass(frozen=True)
class Gpu(Place):
    """A GPU, the kernels that run on it, and an engine loaded there."""

    session: DeviceSession


class DevicePipeline(DeviceRun):
    """One reconstruction with a network, after everything it needs was allocated.

    Parameters
    ----------
    gpu
        Where.
    work
        What: the acquisition, the engine and what follows it.
    plan
        How: whole or in patches.
    holdings
        Keep what is allocated.
    chi
        Pointer to the map.
    """

    def __init__(
        self, gpu: Gpu, work: DeviceWorkload, plan: PatchPlan, holdings: Holdings, chi: int
    ) -> None:
        super().__init__(gpu, work, plan, holdings, chi)
        self._work, self._plan = work, plan

    def run(self, done: Callable[[], object]) -> dict[str, Any]:
        """Make the map; return what was found: the field residual, and the step taken."""
        self._mark("")
        self._upload()
        priors = self._priors() if self._work.card.priors else None
        self._mark("upload")
        if priors is not None:
            steps = priors.make()
            self._mark("prepare")
            self._tell(steps, done)
        self._infer(done)
        self._mark("inference")
        if self._work.card.anchor is not None:
            self._anchor(self._work.card.anchor)
            self._mark("anchor")
        return self._compare_and_correct()

    def _upload(self) -> None:
        work, scan = self._work, self._work.scan
        self._send("inside", scan.mask.view(np.uint8))
        for name in work.channels.keys() - {prior.name for prior in work.card.priors}:
            if name == FIELD:
                self._take_field()
            else:
                self._send(name, network_input(work.card, scan, name))
        for name, values in work.numbers.items():
            self._send(name, values)
        for n, axis in enumerate(self._plan.axes):
            self._send(f"windows {n}", axis.windows)

    def _priors(self) -> DevicePriors:
        """Return what makes the prior maps; total variation waits for the field's norm."""
        priors, scan = self._work.card.priors, self._work.scan
        box, at = self._box(self._stages["prepare"])
        variation = None
        if variation_steps(priors):
            alpha = alpha_of_noise(field_noise_ppm(scan), scan.geometry)
            variation = self._variation(box, at, alpha)
        return DevicePriors(priors, self._at, box, at, self._padded, variation)

    def _masked(self, volume: int, to: int) -> None:
        shape = self._work.scan.mask.shape
        box = PatchBox(shape, (0, 0, 0), shape)
        self._library.patch_finish(box, volume, to, mask=self._at["inside"], stream=self._stream)

    def _infer(self, done: Callable[[], object]) -> None:
        work, plan, at = self._work, self._plan, self._at
        mask = work.scan.mask
        inside = [patch for patch in plan if mask[patch.inside].any()]
        self._device.zero(at["total"], FLOAT * work.voxels, self._stream)
        volumes = {name: at[name] for name in work.channels}
        if work.signs_field:
            self._sign_field()
            volumes[FIELD] = at[SIGNED]
        DevicePatches(
            self._device,
            self._library,
            self._holdings,
            work.session,
            volumes,
            work.channels,
            (at["windows 0"], at["windows 1"], at["windows 2"]),
            at["total"],
            self._workers(min(len(inside), WORKERS)),
        ).run(inside, self._stream, done)
        self._masked(at["total"], at["chi"])

    def _sign_field(self) -> None:
        work, shape, at = self._work, self._work.scan.mask.shape, self._at
        channels = work.channels[FIELD]
        box = PatchBox(shape, (0, 0, 0), shape, channels)
        self._library.patch_gather(box, at[FIELD], at[SIGNED], self._stream)
        vectors = replace(self._vectors, count=channels * work.voxels)
        vectors.combine(work.field_sign - 1, at[FIELD], 1, at[SIGNED])

    def _anchor(self, anchor: Anchor) -> None:
        """Keep some of a prior map, as ``..inversion.prior_maps.anchored`` does."""
        box, at = self._box(self._stages["anchor"])
        chi, x, prior, between = self._at["chi"], at["x"], at["prior"], at["between"]
        box.load(chi, x)
        box.load(self._at[anchor.prior], prior)
        self._padded.combine(-1, prior, 1, x)
        tkd = DipoleOperator(box.grid.geometry, "tkd", threshold=anchor.threshold)
        for _ in range(2):
            box.apply(tkd, x, x)
            box.apply(DipoleOperator(box.grid.geometry), x, x)
        box.masked(x, between)
        self._padded.combine(1, prior, 1, between)
        box.store(between, x, chi)

    def _workers(self, count: int) -> list[Worker]:
        work = self._work
        shapes = work.shapes(self._plan)
        scratch = self._stages["inference"].at(self._scratch)
        numbers = {name: self._at[name] for name in work.numbers}
        workers = [
            Worker(
                self._holdings.stream(),
                {name: scratch[f"{name} {n}"] for name in work.channels} | numbers,
                scratch[f"output {n}"],
                work.session.open_inference(shapes, scratch[f"scratch {n}"]),
            )
            for n in range(count)
        ]
        self._kept += workers
        return workers

    def _compare_and_correct(self) -> dict[str, Any]:
        step = self._work.correction
        if step is None:
            return {"field_residual": self._residual()} if self._work.evaluates else {}
        before, fitted = self._residual(), None
        stage, chi, field = self._stages["data consistency"], self._at["chi"], self._at[FIELD]
        if step.iterations is None:
            dipole, at = self._dipole(stage, (PAD_VOXELS,) * 3)
            closed_form(chi, field, step.lam, dipole, self._vectors, at["image"])
        else:
            box, at = self._box(stage)
            iterative_form(chi, field, step.lam, step.iterations, box, self._padded, at)
        self._mark("data consistency")
        if step.iterations is not None:
            missed, measured = self._numbers(2)
            fitted = float(np.sqrt(missed / measured))
        return {"data_consistency": step.report(before, self._residual(), fitted)}
