"""The images of one role as stacks of slices, one for each echo, and whether they are whole."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.dicom.acquisition import normal
from qsm_deploy.runtime.dicom.headers import Frame

Stack = tuple[float, tuple[Frame, ...]]  # echo time [s], and its images along the slices
SPACING, ORIENTATION = 0.01, 1e-4  # that slices may differ by: relative, and of unit vectors
US = 1e6


def stacks_of(frames: Sequence[Frame], name: str) -> list[Stack]:
    """Return the slices of every echo, by echo time, after checking that nothing is missing.

    Parameters
    ----------
    frames
        Of one role of one series.
    name
        For messages.

    Raises
    ------
    DataError
        If an echo lacks a slice or has one twice, slices are not evenly spaced or lie otherwise
        than the first, an echo time is missing, or compression has changed the pixels.
    """
    _require_alike(frames, name)
    stacks = [
        (time, tuple(sorted(images, key=lambda f: float(f.position_mm @ normal(frames[0])))))
        for time, images in sorted(_by_echo(frames, name).items())
    ]
    for time, images in stacks:
        _require_one_each(images, f"{name}, echo of {1e3 * time:g} ms")
    counts = Counter(len(images) for _, images in stacks)
    usual = max(counts)
    for number, (time, images) in enumerate(stacks, 1):
        if len(images) != usual:
            raise DataError(
                f"{name}: echo {number} ({1e3 * time:g} ms) has {len(images)} images, another "
                f"{usual}; a slice is missing: export the series again"
            )
    for number, (_, images) in enumerate(stacks, 1):
        _require_even(images, f"{name}, echo {number}")
        _require_same_places(stacks[0][1], images, f"{name}: echo 1", f"echo {number}")
    return stacks


def require_same_slices(
    first: Sequence[Stack], second: Sequence[Stack], name: str, other: str
) -> None:
    """Refuse two roles that are not of the same echoes and slices.

    Raises
    ------
    DataError
        If they are not.
    """
    times, theirs = ([round(time * US) for time, _ in side] for side in (first, second))
    if times != theirs:
        said, seen = (", ".join(f"{t / 1e3:g}" for t in ts) for ts in (times, theirs))
        raise DataError(f"{name} has echoes of {said} ms, {other} of {seen} ms; export all of both")
    for number, ((_, images), (_, others)) in enumerate(zip(first, second, strict=True), 1):
        if len(images) != len(others):
            raise DataError(
                f"{name} has {len(images)} images of echo {number}, {other} {len(others)}; a slice "
                "is missing: export both series again"
            )
        if images[0].shape != others[0].shape:
            sizes = ("x".join(map(str, side[0].shape)) for side in (images, others))
            raise DataError(f"{name} and {other} have images of {' and '.join(sizes)} pixels")
        _require_same_places(images, others, name, other)


def _by_echo(frames: Sequence[Frame], name: str) -> dict[float, list[Frame]]:
    """Return the images of each echo time [s], which an echo number has one of."""
    found: dict[int, list[Frame]] = defaultdict(list)
    numbered: dict[int, Counter[int]] = defaultdict(Counter)
    for frame in frames:
        if frame.echo_time_s is None:
            raise DataError(f"{name}: {frame.path.name} says no EchoTime; export the series again")
        time = round(frame.echo_time_s * US)
        found[time].append(frame)
        if frame.echo_number is not None:
            numbered[frame.echo_number][time] += 1
    if min(numbered, default=1) > 1:
        raise DataError(
            f"{name}: it begins with echo {min(numbered)}; a difference of phases, as field maps "
            "are, makes no map, and of an acquisition all echoes are needed"
        )
    for number, times in numbered.items():
        if len({*times.values()}) > 1:
            seen = " and ".join(f"{t / 1e3:g} ms ({n} images)" for t, n in times.most_common(2))
            raise DataError(f"{name}: echo {number} has echo times of {seen}; they must be equal")
    return {time / US: images for time, images in found.items()}


def _require_alike(frames: Sequence[Frame], name: str) -> None:
    """Refuse images that lie or are sampled otherwise than the first, or that lost something."""
    first = frames[0]
    for frame in frames:
        if frame.lossy:
            raise DataError(
                f"{name}: its pixels were compressed with loss, which no phase survives; export it "
                "uncompressed"
            )
        differs = {
            "orientation": np.abs(frame.orientation - first.orientation).max() > ORIENTATION,
            "number of rows and columns": frame.shape != first.shape,
            "pixel spacing": not np.allclose(frame.spacing_mm, first.spacing_mm, rtol=SPACING),
            "frame of reference": frame.frame_of_reference != first.frame_of_reference,
        }
        for what, other in differs.items():
            if other:
                count = sum(1 for f in frames if f.series == frame.series)
                raise DataError(
                    f"{name}: its {count} images are not of one {what}; export the acquisition "
                    "alone"
                )


def _require_one_each(images: Sequence[Frame], name: str) -> None:
    """Refuse several images of one place."""
    places = Counter(tuple(np.round(frame.position_mm, 2)) for frame in images)
    if len(places) < len(images):
        raise DataError(
            f"{name}: {len(images)} images of {len(places)} slices; are there several repetitions "
            "or coils in the series? Export one, combined"
        )


def _require_even(images: Sequence[Frame], name: str) -> None:
    """Refuse slices that are not evenly spaced along their normal."""
    if len(images) < 2:
        raise DataError(f"{name}: it has one slice; a map needs a volume")
    steps = np.diff(_places(images), axis=0)
    along = steps @ normal(images[0])
    usual = float(np.median(along))
    gap = int(np.argmax(np.abs(along - usual)))
    if abs(along[gap] - usual) > SPACING * usual:
        missing = along[gap] > 1.5 * usual
        why = "a slice is missing there" if missing else "one is not where it should be"
        raise DataError(
            f"{name}: {len(images)} slices {usual:.4g} mm apart, but {along[gap]:.4g} mm between "
            f"{gap + 1} and {gap + 2}; {why}: export the series again"
        )
    aside = np.linalg.norm(steps - np.outer(along, normal(images[0])), axis=1).max()
    if aside > SPACING * usual:
        raise DataError(
            f"{name}: its slices lie {aside:.3g} mm aside of each other, which no acquisition of a "
            "volume has"
        )


def _require_same_places(
    images: Sequence[Frame], others: Sequence[Frame], name: str, other: str
) -> None:
    off = np.linalg.norm(_places(images) - _places(others), axis=1)
    step = np.linalg.norm(_places(images)[1] - _places(images)[0])
    worst = int(off.argmax())
    if off[worst] > SPACING * step:
        raise DataError(
            f"{name} and {other} do not lie at the same place: slice {worst + 1} is "
            f"{off[worst]:.3g} mm off"
        )


def _places(images: Sequence[Frame]) -> NDArray[np.float64]:
    """Return the (n, 3) positions of images [mm]."""
    return np.stack([frame.position_mm for frame in images])
