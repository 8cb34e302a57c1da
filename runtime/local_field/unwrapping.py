"""Spatial phase unwrapping along the most reliable paths.

The voxels of a mask are joined by the spanning tree of least cost, where an edge is cheap if the
phase is alike on both sides, steps as much as at another echo, and the signal is even.
Along the tree every step is taken to be less than half a turn. The tree of each connected part
is the one that growing from its best seed gives, so the result does not depend on where one
starts, but for a whole number of turns, which is chosen so that each part's median lies within half
a turn of zero.

References
----------
Dymerska et al., Magn Reson Med 85:2294-2308 (2021), for the weights.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import median
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree

from qsm_deploy.kernels.geometry import Mask, Volume

Edges = tuple[NDArray[np.int32], NDArray[np.int32]]

TURN = np.float32(2 * math.pi)


def wrap(phase_rad: Volume) -> Volume:
    """Return phase within half a turn of zero."""
    wrapped: Volume = phase_rad - TURN * np.rint(phase_rad / TURN)
    return wrapped


def unwrap(
    phase_rad: Volume, mask: Mask, magnitude: Volume, other_phase_rad: Volume | None = None
) -> Volume:
    """Return a phase without jumps of a turn.

    Parameters
    ----------
    phase_rad
        (x, y, z) phase, wrapped or not.
    mask
        (x, y, z) bool; what lies outside is not unwrapped.
    magnitude
        (x, y, z) signal, not negative.
    other_phase_rad
        (x, y, z) phase that steps by about as much; steps in which both agree are the more
        reliable.

    Returns
    -------
    (x, y, z) float32 array
        Phase [rad], a whole number of turns from the input, 0 outside the mask.
    """
    number = np.full(mask.shape, -1, dtype=np.int32)
    number[mask] = np.arange(np.count_nonzero(mask), dtype=np.int32)
    phase = wrap(phase_rad[mask])
    other = None if other_phase_rad is None else wrap(other_phase_rad[mask])
    edges = _edges(number)
    before, part = _paths(edges, _cost(edges, phase, magnitude[mask], other), phase.size)
    unwrapped = np.zeros(mask.shape, dtype=np.float32)
    unwrapped[mask] = phase + TURN * _turns(before, part, phase)
    return unwrapped


def _edges(number: NDArray[np.int32]) -> Edges:
    """Return the pairs of neighbours in the mask, by their numbers."""
    starts, ends = [], []
    for axis in range(3):
        low, high = np.moveaxis(number, axis, 0)[:-1], np.moveaxis(number, axis, 0)[1:]
        both = (low >= 0) & (high >= 0)
        starts.append(low[both])
        ends.append(high[both])
    return np.concatenate(starts), np.concatenate(ends)


def _cost(edges: Edges, phase: Volume, magnitude: Volume, other: Volume | None) -> Volume:
    """Return the cost of every edge, in (0, 1]; it is higher the less reliable the step is."""
    start, end = edges
    step = wrap(phase[end] - phase[start])
    quality = 1 - np.abs(step) * np.float32(2) / TURN
    if other is not None:
        change = np.abs(step - wrap(other[end] - other[start]))
        quality *= np.maximum(0, 1 - change * np.float32(2) / TURN)
    weak = np.minimum(magnitude[start], magnitude[end])
    strong = np.maximum(magnitude[start], magnitude[end])
    quality *= np.divide(weak, strong, out=np.zeros_like(weak), where=strong > 0) ** 2
    # no edge may cost nothing: a sparse graph takes that for no edge
    cost: Volume = np.maximum(1 - quality, np.float32(1e-6))
    return cost


def _paths(edges: Edges, cost: Volume, count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return for each voxel the one before it on the tree, a root's being itself, and its part."""
    graph = coo_array((cost, edges), shape=(count, count)).tocsr()
    tree = minimum_spanning_tree(graph, overwrite=True).tocoo()
    _, part = connected_components(tree, directed=False)
    _, roots = np.unique(part, return_index=True)
    # one more node, joined to the root of every part, makes it one tree
    start = np.concatenate([tree.row, np.full(roots.size, count)])
    end = np.concatenate([tree.col, roots])
    joined = coo_array((np.ones(start.size, dtype=np.int8), (start, end)), shape=(count + 1,) * 2)
    _, before = breadth_first_order(joined.tocsr(), count, directed=False)
    before = before[:count]
    before[roots] = roots
    return before, part


def _turns(before: NDArray[np.int32], part: NDArray[np.int32], phase: Volume) -> Volume:
    """Return how many turns to add to each phase."""
    turns = -np.rint((phase - phase[before]) / TURN).astype(np.int32)
    # every round doubles the length of the paths that are summed
    while (further := before[before]).tobytes() != before.tobytes():
        turns += turns[before]
        before = further
    unwrapped = phase + TURN * turns
    medians = np.atleast_1d(median(unwrapped, part, np.arange(part.max() + 1)))
    total: Volume = (turns - np.rint(medians / TURN)[part]).astype(np.float32)
    return total
