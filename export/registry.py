"""The networks that can be exported, and everything about each that its weights do not say."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qsm_deploy.kernels.errors import UsageError, WeightsError
from qsm_deploy.runtime.card import GeometryLimits, TkdSettings

if TYPE_CHECKING:  # listing the networks must not cost the import of torch
    from torch import Tensor

    from qsm_deploy.export.networks.network import Network

WEIGHTS_FOLDER = Path(__file__).with_name("weights")
ANY_GEOMETRY = GeometryLimits(None, None, None, None)
AXIAL_1MM = GeometryLimits((1.0, 1.0, 1.0), 0.1, (0.0, 0.0, 1.0), 5.0)


@dataclass(frozen=True)
class Weights:
    """Where weights come from, and under which licence."""

    source: str
    licence: str


@dataclass(frozen=True)
class NetworkSpec:
    """One network.

    Attributes
    ----------
    name
        What ``--model`` calls it.
    build
        Makes the module, in evaluation mode, from a state dict and the chosen options.
    pipeline
        What the runtime does besides running the graph.
    geometry
        The grids it was trained for.
    published
        The weights of its authors.
    doi
        Of the paper that describes it.
    tkd
        Settings of the second input of a ``tkd+cnn`` pipeline.
    options
        The choices it offers, the default first.
    bundled
        A file in the weights folder and where it comes from, if weights come along.
    """

    name: str
    build: "Callable[[Mapping[str, Tensor], Mapping[str, str]], Network]"
    pipeline: Literal["cnn", "tkd+cnn"]
    geometry: GeometryLimits
    published: Weights
    doi: str | None = None
    tkd: TkdSettings | None = None
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    bundled: tuple[str, Weights] | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the graph's inputs."""
        return ("local_field_ppm", "tkd_chi_ppm")[: 1 + (self.pipeline == "tkd+cnn")]

    def bundled_file(self) -> Path:
        """Return the weights that come with this package.

        Raises
        ------
        WeightsError
            If there are none; the message names the authors' source.
        """
        if self.bundled and (path := WEIGHTS_FOLDER / self.bundled[0]).is_file():
            return path
        raise WeightsError(
            f"no weights of {self.name} are bundled; get them at {self.published.source} "
            "and pass the file with --weights"
        )

    def chosen_options(self, chosen: Mapping[str, str | None]) -> dict[str, str]:
        """Return a value for every option, the default where none was chosen.

        Raises
        ------
        UsageError
            If an option was chosen that this network does not have, or a value it does not know.
        """
        given = {name: value for name, value in chosen.items() if value is not None}
        for name, value in given.items():
            if value not in self.options.get(name, ()):
                known = ", ".join(f"--{n} {'|'.join(v)}" for n, v in self.options.items())
                raise UsageError(
                    f"--{name} {value} is no option of {self.name}, which has {known or 'none'}"
                )
        return {name: given.get(name, values[0]) for name, values in self.options.items()}


def _build_ir2qsm(state: "Mapping[str, Tensor]", options: Mapping[str, str]) -> "Network":
    from qsm_deploy.export.checkpoints import load_strictly
    from qsm_deploy.export.networks.ir2qsm import ir2qsm_from_state, unused_keys

    residual: Literal["input", "iteration"] = (
        "iteration" if options.get("residual") == "iteration" else "input"
    )
    network = ir2qsm_from_state(state, residual)
    load_strictly(network, state, unused_keys(network.levels))
    return network.eval()


def _build_tkd_unet(state: "Mapping[str, Tensor]", options: Mapping[str, str]) -> "Network":
    from qsm_deploy.export.checkpoints import load_strictly
    from qsm_deploy.export.networks.tkd_unet import tkd_unet_from_state

    network = tkd_unet_from_state(state)
    load_strictly(network, state)
    return network.eval()


OWN_LICENCE = "as qsm-deploy"
REGISTRY = {
    spec.name: spec
    for spec in (
        NetworkSpec(
            name="ir2qsm",
            build=_build_ir2qsm,
            pipeline="cnn",
            geometry=AXIAL_1MM,
            published=Weights(
                "https://drive.google.com/file/d/1EGZGxdgVWI8r0RlyfjP-xQyOL88vLeDf "
                "(model_IR2Unet.pth)",
                "none declared",
            ),
            doi="10.1002/mp.17747",
            options={"residual": ("input", "iteration")},
            bundled=(
                "ir2qsm-demo.safetensors",
                Weights("a half-width demo trained by examples/train.py", OWN_LICENCE),
            ),
        ),
        NetworkSpec(
            name="tkd-unet",
            build=_build_tkd_unet,
            pipeline="tkd+cnn",
            geometry=ANY_GEOMETRY,
            published=Weights("examples/train.py, which trains them", OWN_LICENCE),
            tkd=TkdSettings(threshold=0.12, pad_voxels=8, masked=True),
            bundled=(
                "tkd-unet.safetensors",
                Weights("trained by examples/train.py", OWN_LICENCE),
            ),
        ),
    )
}


def network_spec(name: str) -> NetworkSpec:
    """Return the network of that name.

    Raises
    ------
    UsageError
        If there is none.
    """
    if name not in REGISTRY:
        raise UsageError(f"--model {name}: no such network; known are {', '.join(REGISTRY)}")
    return REGISTRY[name]
