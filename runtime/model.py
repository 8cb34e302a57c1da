"""The public interface: a model opened once, from arrays to an array, from files to files."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.console.time_limit import LONGEST_S
from qsm_deploy.runtime.gpu.arrays import is_on_device
from qsm_deploy.runtime.job.one_scan import measured_scan, run_field, run_scan
from qsm_deploy.runtime.job.report import way_text
from qsm_deploy.runtime.job.request import (
    PathLike,
    Request,
    gives_of,
    make_request,
    maker_from,
    paths_of,
    wants_from,
)
from qsm_deploy.runtime.reconstruction.network import Network
from qsm_deploy.runtime.reconstructor import (
    Host,
    Maker,
    Reconstructor,
    models_of,
    open_reconstructor,
)
from qsm_deploy.runtime.scan.arrays import scan_from_arrays
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.session import AUTO, Precision

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Progress = Callable[[int, int], object]
METHOD = {"method", "alpha", "iterations", "robust", "threshold", "lam"}
HOST = {f.name for f in fields(Host)}


@dataclass(frozen=True)
class Result:
    """What :func:`run` made.

    Attributes
    ----------
    chi_ppm
        (x, y, z) float32 susceptibility, or what else is given first [ppm], 0 outside the mask;
        ``None`` of a dry run, and of one until a field, which is the scan's.
    maps
        All that is given, by the names in cards.
    report
        Everything that decided the result and what was found, as ``--report`` writes it.
    scan
        The acquisition, as it is stored and as the map is for it.
    """

    chi_ppm: Volume | None
    report: dict[str, Any]
    scan: Scan
    maps: dict[str, Volume] = field(default_factory=dict)

    def figure(
        self, slices: Sequence[float] | None = None, window: Sequence[float] | None = None
    ) -> "Figure":
        """Return the picture of three planes that ``--figure`` writes.

        Parameters
        ----------
        slices
            Where the planes lie: R, A and S [mm], or the stored voxel where the axes are not known;
            by default the centre of the mask.
        window
            Lowest and highest susceptibility shown, in the unit of ``out_units``.

        Raises
        ------
        MissingDependencyError
            If matplotlib is not installed.
        UsageError
            If nothing was reconstructed, ``slices`` lie outside the mask's box, or ``window`` is
            none.
        """
        from qsm_deploy.runtime.page.figure import require_look, scan_figure
        from qsm_deploy.runtime.page.rows import scan_rows

        if self.chi_ppm is None:
            raise UsageError("nothing was reconstructed: there is no map to draw")
        require_look(slices, window)
        scan, said = self.scan.canonical(), self.report
        maps = {name: scan.axes.turn(volume) for name, volume in self.maps.items()}
        rows = scan_rows(scan, maps, unit=said["units"], window=window)
        return scan_figure(scan, rows, said["title"], about=way_text(said), slices=slices)


class _Warnings(TerminalLog):
    """Says what the user must see as Python says it, and tells the caller how far it is."""

    def __init__(self, progress: Progress | None) -> None:
        super().__init__(quiet=True)
        self._progress = progress

    def warn(self, text: str) -> None:
        """Issue a warning."""
        warnings.warn(text, stacklevel=2)

    @contextmanager
    def progress(self, total: int) -> Iterator[Any]:
        """Count the patches."""
        yield SimpleNamespace(update=_counter(self._progress, total))


class Model:
    """What reconstructs, opened once for many scans; one thread at a time.

    See :func:`open_model`.
    """

    def __init__(self, reconstructor: Reconstructor, maker: Maker) -> None:
        self.reconstructor = reconstructor
        self._models = models_of(maker)

    def __repr__(self) -> str:
        """Return its name."""
        return f"Model({self.reconstructor.inversion.name})"

    @property
    def card(self) -> ModelCard:
        """What the network is, and what it may be used for.

        Raises
        ------
        UsageError
            If it is a method.
        """
        inversion = self.reconstructor.inversion
        if not isinstance(inversion, Network):
            raise UsageError(f"{inversion.name} is no network and has no card")
        return inversion.card

    def reconstruct(
        self,
        field_ppm: Any,
        mask: Any = None,
        *,
        voxel_size_mm: Sequence[float],
        b0_direction: Sequence[float] | Sequence[Sequence[float]],
        echo_time_s: float | Sequence[float] | None = None,
        field_strength_t: float | None = None,
        magnitude: Any = None,
        noise_ppm: Any = None,
        chi_ppm: Any = None,
        r2prime_hz: Any = None,
        axes: Any = None,
        progress: Progress | None = None,
        **wanted: Any,
    ) -> Any:
        """Return the susceptibility map of one acquisition.

        Parameters
        ----------
        field_ppm
            (x, y, z) local field [ppm], or what else the network takes: a total field, a wrapped
            phase [rad]; (n, x, y, z) for n orientations or n echoes. On a GPU, if the model is on
            one: anything that speaks ``__cuda_array_interface__`` or DLPack, float32.
        mask
            (x, y, z), non-zero inside; ``None`` takes where the field is not zero.
        voxel_size_mm
            Along (x, y, z).
        b0_direction
            In voxel axes, of any non-zero norm; n of them for n orientations.
        echo_time_s, field_strength_t
            Of a phase; a time for each of n echoes.
        magnitude, noise_ppm
            (x, y, z) signal and noise of the field, for the methods that take them; the signal of
            each of n echoes.
        chi_ppm, r2prime_hz
            (x, y, z) susceptibility [ppm] and R2' [Hz], for networks that take them.
        axes
            Where x, y and z run to: letters such as ``LPS``, or the affine to RAS [mm]. With it
            the map of one head is the same in every order of storage.
        progress
            Called with the patches or iterations that are done and their number.
        **wanted
            As for :func:`wants_from`: patch, overlap, blend, data_consistency, dc_iterations,
            allow_geometry, memory_limit.

        Returns
        -------
        (x, y, z) float32 array, or a dict of them
            Susceptibility, or what else the network gives [ppm], 0 outside the mask; on the GPU if
            the field was there. Of a network that gives several, by their names in its card.

        Raises
        ------
        QsmDeployError
            As the command line does, one subclass for each cause.
        """
        wants = wants_from(**wanted)
        if is_on_device(field_ppm):
            from qsm_deploy.runtime.embedding import Engine

            if any(v is not None for v in (magnitude, noise_ppm, chi_ppm, r2prime_hz)):
                raise UsageError("a field on the GPU is taken alone; drop the other volumes")
            engine = Engine(self.reconstructor)
            grid: Any = {"voxel_size_mm": voxel_size_mm, "b0_direction": b0_direction}
            return engine.reconstruct(field_ppm, mask, **grid, axes=axes, wants=wants)
        needs = self.reconstructor.needs
        for name, volume in (("chi_ppm", chi_ppm), ("r2prime_hz", r2prime_hz)):
            if (volume is None) == (name in needs.maps):
                takes = " and ".join((needs.quantity, *needs.maps))
                raise UsageError(f"{needs.network} takes {takes}: pass them, and no other maps")
        scan = scan_from_arrays(
            field_ppm,
            mask,
            voxel_size_mm=voxel_size_mm,
            b0_direction=b0_direction,
            quantity=needs.quantity,
            keeps_outside=needs.unmasked,
            chi_ppm=chi_ppm,
            r2prime_hz=r2prime_hz,
            echo_time_s=echo_time_s,
            field_strength_t=field_strength_t,
            magnitude=magnitude,
            noise_ppm=noise_ppm,
            axes=axes,
        )
        planned = self.reconstructor.plan(scan, wants)
        for note in (*planned.notes, *planned.task.notes):
            warnings.warn(note, stacklevel=2)
        done = _counter(progress, planned.task.runs)
        made = self.reconstructor.run(planned, Stages(), done)
        for note in made.findings.get("notes", ()):
            warnings.warn(note, stacklevel=2)
        first = scan.axes.turn_back(made.map_ppm)
        if not made.further:
            return first
        further = {name: scan.axes.turn_back(volume) for name, volume in made.further.items()}
        return {self.reconstructor.needs.gives[0]: first, **further}

    def run(
        self,
        field: PathLike | Sequence[PathLike] = (),
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> Result:
        """Reconstruct files with the opened model; see :func:`run` for the options."""
        said: dict[str, Any] = {"inputs": self._models, "gives": self.reconstructor.needs.gives}
        request = make_request(paths_of(field), **said, **_one_direction(options))
        return _run(request, self.reconstructor, Stages(), progress)


def open_model(
    model: PathLike | Sequence[PathLike] | None = None,
    *,
    backend: str = AUTO,
    device: str = AUTO,
    precision: Precision = "auto",
    threads: int = 0,
    plan_cache: PathLike = AUTO,
    time_limit: float = LONGEST_S,
    **method: Any,
) -> Model:
    """Open a model for many scans, or take a method.

    Parameters
    ----------
    model
        An ONNX file or a plan of qsm-export, both parts of AFTER-QSM, or several of which each
        takes what the one before gives; ``None`` is a method.
    backend
        ``onnxruntime`` or ``openvino`` on the CPU; ``auto`` takes the fastest that is installed.
    device
        ``cpu``, ``cuda:N``, or ``auto``: the first GPU for a plan, where there is one, the CPU for
        an ONNX file.
    precision
        ``fp32`` or ``bf16``, of the backend; ``auto`` is fp32, and for a file in INT8 that, where
        its card and the CPU allow it.
    threads
        Of the CPU, 0 for all cores.
    plan_cache
        The folder for engines of plans that did not fit and were built again; ``auto`` is the
        user's, ``off`` none.
    time_limit
        For opening a model on the CPU, and for each time that it runs, once for each patch [s].
    **method
        ``method`` is the name of one, or of a bundled network, by default ``tv``; what is said to
        it are alpha [ppm mm], iterations, robust, threshold, lam, as the flags of ``qsm-run``.

    Raises
    ------
    QsmDeployError
        If the model cannot be opened there; one subclass for each cause.
    """
    maker = _maker(model, method)
    host = Host(backend, device, precision, threads, plan_cache, time_limit)
    return Model(open_reconstructor(maker, host, _Warnings(None)), maker)


def reconstruct(
    field_ppm: Any,
    mask: Any = None,
    *,
    voxel_size_mm: Sequence[float],
    b0_direction: Sequence[float] | Sequence[Sequence[float]],
    model: PathLike | Sequence[PathLike] | None = None,
    **options: Any,
) -> Any:
    """Return the susceptibility map of one acquisition; see :func:`open_model`, :class:`Model`."""
    said = {name: options.pop(name) for name in (METHOD | HOST) & options.keys()}
    return open_model(model, **said).reconstruct(
        field_ppm, mask, voxel_size_mm=voxel_size_mm, b0_direction=b0_direction, **options
    )


def run(
    field: PathLike | Sequence[PathLike] = (),
    *,
    model: PathLike | Sequence[PathLike] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Reconstruct files, as ``qsm-run`` does.

    Parameters
    ----------
    field
        A field map (.nii or .nii.gz), or one for each orientation; nothing if it begins with
        ``phase`` or ``total_field``.
    model
        As for :func:`open_model`; so are backend, device, precision, threads, plan_cache and
        time_limit.
    progress
        Called with the patches that are done and their number.
    **options
        The flags of ``qsm-run``, by their names: mask, output, report, figure, html, html_names,
        slices, window, out_units, out_dtype, force, dry_run, truth, labels, params, units,
        echo_time, field_strength, b0_direction, voxel_size, negate, chi, r2prime, patch, overlap,
        blend, data_consistency, dc_iterations, allow_geometry, memory_limit, magnitude, noise_map,
        phase, real, imag, echo_times, phase_scale, total_field, local_field, quality, r2star,
        brain_mask, background_removal, erode, until; and ``method`` with what is said to it.
        Without ``output`` no map is written.
        Notes are issued as warnings, and stand in the report.

    Raises
    ------
    QsmDeployError
        As the command line does, one subclass for each cause.
    """
    maker = _maker(model, {name: options.pop(name) for name in METHOD & options.keys()})
    host = Host(**{name: options.pop(name) for name in HOST & options.keys()})
    said: dict[str, Any] = {"inputs": models_of(maker), "gives": gives_of(maker)}
    request = make_request(paths_of(field), **said, **_one_direction(options))
    stages = Stages()
    with stages("load"):
        limit = request.wants.memory_limit
        log = _Warnings(progress)
        reconstructor = open_reconstructor(maker, host, log, stays=False, memory_limit=limit)
    return _run(request, reconstructor, stages, progress)


def _run(
    request: Request, reconstructor: Reconstructor, stages: Stages, progress: Progress | None
) -> Result:
    log = _Warnings(progress)
    if request.begins.until != "chi":
        made, scan = run_field(request, log)
        return Result(None, made, scan.turned(scan.axes.inverse))
    measured, kept = measured_scan(request, reconstructor, log, stages)
    finished = run_scan(request, reconstructor, measured, log, stages, kept)
    scan = finished.scan or finished.planned.prepared.measured
    maps = {name: scan.axes.turn_back(volume) for name, volume in finished.maps.items()}
    first = next(iter(maps.values()), None)
    return Result(first, finished.report, scan.turned(scan.axes.inverse), maps)


def _one_direction(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with one B0 direction as the only one of a list."""
    direction = options.get("b0_direction")
    if direction is not None and np.ndim(direction) == 1:
        return options | {"b0_direction": [direction]}
    return options


def _maker(model: PathLike | Sequence[PathLike] | None, method: dict[str, Any]) -> Maker:
    return maker_from(() if model is None else paths_of(model), **method)


def _counter(progress: Progress | None, total: int) -> Callable[[], object]:
    if progress is None:
        return lambda: None
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return count
