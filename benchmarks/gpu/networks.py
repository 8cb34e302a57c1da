"""The networks that are measured, heads for them, and the maps that others are compared with."""

from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.machine import Machine, Shape
from benchmarks.gpu.torch_session import TorchSession
from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.measure.verification import ModuleSession, phantom_scan
from qsm_deploy.export.networks import ir2qsm, tv_unet
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import network_spec
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.card.card import MemoryUse, ModelCard, ReceptiveField
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu.engines.inference import DeviceSession
from qsm_deploy.runtime.gpu.layout import DeviceWorkload
from qsm_deploy.runtime.gpu.pipeline import Gpu
from qsm_deploy.runtime.gpu.reconstruction import network_job, reconstruct_on_device
from qsm_deploy.runtime.reconstruction.correction import Correction
from qsm_deploy.runtime.reconstruction.patches import PatchPlan, plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import reconstruct
from qsm_deploy.runtime.scan.scan import Scan

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "export" / "weights"


class Networks:
    """Bundled ones, and IR2QSM in full width, weights random.

    What is trained is kept beside the path ``trained``.
    """

    def __init__(self, machine: Machine, trained: Path) -> None:
        self.machine, self.trained = machine, trained
        residual = Choices({"residual": "input"})
        torch.manual_seed(0)
        demo = load_state(WEIGHTS / "ir2qsm-demo.safetensors")
        unet = tv_unet.network_from_state(load_state(WEIGHTS / "tv-unet.safetensors"), Choices())
        if few := machine.scale.iterations:
            unet.priors = tuple(replace(p, steps=few["iterations"]) for p in unet.priors)
        self.modules: dict[str, Network] = {
            "tv-unet": unet,
            "ir2qsm demo": ir2qsm.network_from_state(demo, residual),
            "ir2qsm": ir2qsm.IR2QSM(**machine.scale.network).eval(),
        }
        self.choices = {name: residual if "ir2qsm" in name else Choices() for name in self.modules}
        self.scan = lru_cache(self._scan)
        self.graph = lru_cache(lambda name: onnx_from_module(self.modules[name]))
        self._maps: dict[tuple[object, ...], Volume] = {}

    def _scan(self, shape: Shape) -> Scan:
        return phantom_scan(self.card("tv-unet"), shape)

    def card(self, name: str, precision: Any = "fp32") -> ModelCard:
        """Return the card of a network, as it is before anything is measured."""
        spec = network_spec(name.split()[0])
        card = provisional_card(spec, self.modules[name], self.choices[name], "none", "0" * 64)
        reach, unknown = ReceptiveField(32, 32, 1.0), {"onnxruntime": MemoryUse(0, 1)}
        return replace(card, precision=precision, receptive_field=reach, memory=unknown)

    def whole(self, name: str, scan: Scan) -> PatchPlan:
        """Return the plan of the whole volume."""
        card = self.card(name)
        return plan_whole(scan.mask.shape, card.divisor, card.pad_front)

    def torch_session(self, name: str, mode: str) -> TorchSession:
        """Return PyTorch as an engine."""
        return TorchSession(self.machine, self.modules[name], self.card(name), mode)

    def on_gpu(
        self, session: DeviceSession, scan: Scan, plan: PatchPlan, step: Correction | None = None
    ) -> tuple[Volume, Stages]:
        """Return a map made on the GPU, and what each stage took there."""
        gpu = Gpu(self.machine.device, self.machine.library, session)
        new = replace(scan)  # whose noise was not found yet
        work = DeviceWorkload(new, session, gpu.library, step, evaluates=False)
        stages = Stages()
        chi, _ = reconstruct_on_device(network_job(gpu, work, plan), stages)
        return chi, stages

    def cpu_map(
        self, name: str, scan: Scan, way: str, plan: PatchPlan, step: Correction | None = None
    ) -> Volume:
        """Return PyTorch's map on the CPU in FP32, made once; a step starts from the whole one."""
        key = (name, way, scan.mask.shape)
        if key not in self._maps:
            if step is None:
                session = ModuleSession(self.modules[name], self.card(name))
                chi = reconstruct(session, scan, plan, Stages())
            else:
                before = self.cpu_map(name, scan, "whole", plan)
                chi, _ = step.apply(before.copy(), scan, Stages())
            self._maps[key] = chi
        return self._maps[key]

    def gpu_map(self, name: str, scan: Scan) -> Volume:
        """Return PyTorch's map on the GPU in FP32, made once: the CPU takes minutes."""
        key = (name, scan.mask.shape)
        if key not in self._maps:
            with closing(self.torch_session(name, "fp32")) as session:
                self._maps[key], _ = self.on_gpu(session, scan, self.whole(name, scan))
        return self._maps[key]
