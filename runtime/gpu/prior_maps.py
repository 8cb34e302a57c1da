"""Prior maps on a GPU; never made on one.

The CPU's are :mod:`qsm_deploy.runtime.reconstruction.prior_maps`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qsm_deploy.kernels.cuda_library import DipoleOperator
from qsm_deploy.runtime.card.card import FIELD, TV_MAPS, PriorMap
from qsm_deploy.runtime.gpu.box import DeviceBox
from qsm_deploy.runtime.gpu.dipole import DeviceVectors
from qsm_deploy.runtime.gpu.variation import BoxVariation


@dataclass(frozen=True)
class DevicePriors:
    """The prior maps of a card, made one after the other on a padded box.

    Attributes
    ----------
    priors
        Each of the field, or of one that total variation makes.
    volumes
        Pointers to the field and to all of them, on the scan's grid.
    box, at
        The padded box, and pointers to its buffers.
    vectors
        Of its volumes.
    variation
        Total variation there, if a prior map needs it.
    """

    priors: Sequence[PriorMap]
    volumes: Mapping[str, int]
    box: DeviceBox
    at: Mapping[str, int]
    vectors: DeviceVectors
    variation: BoxVariation | None

    def make(self) -> list[int]:
        """Enqueue all of them; return an event after each iteration of total variation."""
        counts = dict.fromkeys(p.steps for p in self.priors if p.method in TV_MAPS)
        steps = [step for count in counts for step in self._variation(count)]
        for prior in self.priors:
            if prior.method == "tkd":
                self._tkd(prior)
        return steps

    def _variation(self, iterations: int) -> list[int]:
        """Make those of so many iterations, as ``..inversion.prior_maps.variation_maps`` does."""
        assert self.variation is not None  # the caller knows the card
        x, steps = self.variation.solve(self.volumes[FIELD], iterations)
        tv, box = self.variation.tv, self.box
        self.vectors.combine(1, tv.field, -1, tv.q2)
        box.masked(x, tv.x)
        box.apply(DipoleOperator(tv.geometry), tv.x, tv.s3)
        self.vectors.combine(1, tv.q2, 1, tv.s3)
        made = dict(zip(TV_MAPS, (tv.x, tv.s3, tv.q2), strict=True))
        for prior in self.priors:
            if prior.method in made and prior.steps == iterations:
                box.store(made[prior.method], tv.b, self.volumes[prior.name])
        return steps

    def _tkd(self, prior: PriorMap) -> None:
        """Make one of a field, as ``..inversion.prior_maps.iterated_tkd`` does."""
        assert prior.threshold is not None  # the card was checked
        box, vectors, grid = self.box, self.vectors, self.box.grid.geometry
        field, x, left, between = (self.at[name] for name in ("field", "x", "q2", "b"))
        dipole, tkd = DipoleOperator(grid), DipoleOperator(grid, "tkd", threshold=prior.threshold)
        box.load(self.volumes[prior.of], field)
        box.apply(tkd, field, between)
        box.masked(between, x)
        for _ in range(prior.steps - 1):
            box.apply(dipole, x, between)
            box.masked(between, left)
            vectors.combine(1, field, -1, left)
            box.apply(tkd, left, between)
            box.masked(between, left)
            vectors.combine(1, left, 1, x)
        box.store(x, between, self.volumes[prior.name])
