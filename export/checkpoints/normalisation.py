"""The numbers that authors publish beside their weights, in MATLAB, NumPy and JSON files."""

import json
import math
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.export.checkpoints.file_kind import require_weights_file
from qsm_deploy.export.checkpoints.matlab_v5 import load_mat
from qsm_deploy.kernels.errors import WeightsError

NETWORK_INFO = "network_info"
# what numpy raises on damaged bytes, found by damaging them
DAMAGED = (ValueError, OSError, EOFError, SyntaxError, TypeError, tokenize.TokenError)
Arrays = dict[str, NDArray[Any]]


def load_normalisation(paths: Sequence[Path]) -> Arrays:
    """Read MATLAB ``.mat``, NumPy ``.npy`` and ``.json`` files, all into one mapping.

    Returns
    -------
    arrays by name
        Without axes of length one. An array of a ``.npy`` file has no name: it gets the file's,
        or ``network_info`` where the file's begins with that. What stands in an object of JSON has
        its name before its own, as in ``settings.scale``.

    Raises
    ------
    WeightsError
        If a file is missing, damaged, of another kind or holds a pickle, which is not run, or two
        files hold the same name.
    """
    arrays: Arrays = {}
    for path in paths:
        part = _load_file(path)
        if twice := arrays.keys() & part.keys():
            raise WeightsError(
                f"{path}: holds {min(twice)}, as another of the files; pass one of them"
            )
        arrays |= part
    return arrays


def number_from(
    arrays: Mapping[str, NDArray[Any]], name: str, source: str, *, positive: bool = False
) -> float:
    """Return the one number that an array holds; see :func:`numbers_from`."""
    return numbers_from(arrays, name, source, 1, positive=positive)[0]


def numbers_from(
    arrays: Mapping[str, NDArray[Any]],
    name: str,
    source: str,
    count: int,
    *,
    positive: bool = False,
) -> list[float]:
    """Return the numbers that an array holds.

    Parameters
    ----------
    arrays
        As read by :func:`load_normalisation`.
    name
        Of the numbers.
    source
        The authors' file that they are in, for the message.
    count
        How many there must be.
    positive
        Whether they must be above zero, as standard deviations.

    Raises
    ------
    WeightsError
        If the name is missing, or there are not so many finite numbers under it.
    """
    if name not in arrays:
        found = ", ".join(sorted(arrays)) or "no files passed"
        raise WeightsError(
            f"the normalisation lacks {name} (found: {found}); "
            f"pass --normalisation {source}, which came with the weights"
        )
    array = arrays[name]
    fits = array.dtype.kind in "fiu" and array.size == count
    numbers = [float(value) for value in array.flat] if fits else []
    if not numbers or not all(math.isfinite(n) and (n > 0 or not positive) for n in numbers):
        seen = numbers or f"an array of {array.dtype} of shape {array.shape}"
        expected = "one finite number" if count == 1 else f"{count} finite numbers"
        raise WeightsError(
            f"{name} is {seen[0] if count == 1 and numbers else seen}, expected {expected}"
            f"{' above zero' if positive else ''}; pass the {source} that came with the weights"
        )
    return numbers


def _load_file(path: Path) -> Arrays:
    require_weights_file(path, "pass the one that came with the weights")
    if path.suffix.lower() == ".mat":
        return load_mat(path)
    if path.suffix.lower() == ".npy":
        return {NETWORK_INFO if path.stem.startswith(NETWORK_INFO) else path.stem: _load_npy(path)}
    if path.suffix.lower() == ".json":
        return _load_json(path)
    raise WeightsError(f"{path}: expected a MATLAB .mat, a NumPy .npy or a .json file")


def _load_json(path: Path) -> Arrays:
    """Return numbers and words by name; lists and null are passed over."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise WeightsError(f"{path}: truncated, or not a JSON file") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected an object of names and numbers")
    arrays: Arrays = {}
    waiting: list[tuple[str, Any]] = list(content.items())
    for name, value in waiting:
        if isinstance(value, dict):
            waiting += [(f"{name}.{inner}", part) for inner, part in value.items()]
        elif isinstance(value, bool | int | float | str):
            arrays[name] = np.array(value)
    return arrays


def _load_npy(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
        if isinstance(array, np.ndarray) and array.dtype.kind in "SU":
            array.astype(str).tolist()  # bytes that are no text show up only here
    except DAMAGED as error:
        if "allow_pickle" in str(error):
            raise WeightsError(
                f"{path}: holds a pickle, refused without running it; where you trust it, save "
                "numpy.array([str(v) for v in numpy.load(FILE, allow_pickle=True)]) again"
            ) from error
        raise WeightsError(f"{path}: truncated, or not a NumPy file") from error
    if not isinstance(array, np.ndarray):
        raise WeightsError(f"{path}: holds several arrays, expected one; save it with numpy.save")
    return array.squeeze()
