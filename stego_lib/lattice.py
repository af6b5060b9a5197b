"""The permutohedral lattice (Adams, Baek and Davis 2010): Gaussian filtering of points in linear time.

Values of points are distributed to the corners of their simplex (splat), blurred along each axis of the lattice, and
interpolated at the points (slice). Each step is a sparse matrix.
"""

import numpy as np
from scipy import sparse


class Lattice:
    """Approximate sums of values over points, weighted by exp(-d^2 / 2) of the distance d.

    Parameters
    ----------
    points
        Float (N, d), in units of the standard deviations of the filter.

    Examples
    --------
    >>> pixels = np.stack(np.indices((60, 80)), -1).reshape(-1, 2) / 3  # a standard deviation of 3 pixels
    >>> Lattice(pixels)(np.ones((60 * 80, 1), np.float32)).shape
    (4800, 1)
    """

    def __init__(self, points: np.ndarray):
        count, dims = points.shape
        keys, shares = corners(points)
        # Encode the d integers of a key as one number, for fast sorting, with a margin of 1 for neighbors.
        low = keys.min((0, 1)) - dims - 1
        strides = np.concatenate([[1], np.cumprod((keys.max((0, 1)) - low + dims + 2)[:-1].astype(np.int64))])
        numbers, corner_of = np.unique((keys - low) @ strides, return_inverse=True)
        corner_of = corner_of.reshape(count, dims + 1)
        starts = np.arange(0, count * (dims + 1) + 1, dims + 1)
        self._slice = sparse.csr_array((shares.ravel(), corner_of.ravel(), starts), (count, len(numbers)))
        self._splat = self._slice.T.tocsr()
        axes = np.ones((dims + 1, dims), np.int64)  # steps between corners, without the last coordinate
        axes[np.arange(dims), np.arange(dims)] = -dims
        self._blurs = [_blur(numbers, step) for step in axes @ strides]
        self._scale = np.float32(1 / (1 + 2.0**-dims))  # normalization of the blur, by the authors

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Filters values, float32 (N, C)."""
        at_corners = self._splat @ values
        for blur in self._blurs:
            at_corners = blur @ at_corners
        return self._scale * (self._slice @ at_corners)


class NormalizedLattice(Lattice):
    """The filter with normalized weights n_i w_ij n_j, n_i = (sum_j w_ij)^-1/2, as in dense CRFs."""

    def __init__(self, points: np.ndarray):
        super().__init__(points)
        norm = sparse.diags_array((super().__call__(np.ones((len(points), 1), np.float32))[:, 0] + 1e-20) ** -0.5)
        self._splat, self._slice = (self._splat @ norm).tocsr(), (norm @ self._slice).tocsr()


def corners(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the simplex of each point, int (N, d + 1, d), and barycentric coordinates, float32 (N, d + 1).

    The last coordinate of a corner is omitted, because coordinates sum to 0.
    """
    count, dims = points.shape
    axis = np.arange(1, dims + 1)
    scaled = (points * (np.sqrt(2 / 3) * (dims + 1) / np.sqrt(axis * (axis + 1)))).astype(np.float32)
    # Map the points to the plane of d + 1 coordinates with sum 0.
    beyond = np.concatenate([np.cumsum(scaled[:, ::-1], 1)[:, ::-1], np.zeros((count, 1), np.float32)], 1)
    lifted = beyond - np.concatenate([np.zeros((count, 1), np.float32), axis * scaled], 1).astype(np.float32)
    nearest = np.round(lifted / (dims + 1)).astype(np.int64) * (dims + 1)
    off = nearest.sum(1) // (dims + 1)
    # Rank coordinates by their remainder, largest first, and correct those that were rounded in the wrong direction.
    rank = np.argsort(np.argsort(nearest - lifted, 1, kind="stable"), 1, kind="stable") + off[:, None]
    turn = (rank < 0).astype(np.int64) - (rank > dims)
    rank, nearest = rank + turn * (dims + 1), nearest + turn * (dims + 1)
    rest, rows = (lifted - nearest) / np.float32(dims + 1), np.arange(count)[:, None]
    sorted_rest = np.empty_like(rest)
    sorted_rest[rows, rank] = rest
    shares = np.empty((count, dims + 1), np.float32)
    shares[:, 1:] = (sorted_rest[:, :-1] - sorted_rest[:, 1:])[:, ::-1]
    shares[:, 0] = 1 - shares[:, 1:].sum(1)
    colors = np.arange(dims + 1)
    keys = nearest[:, None, :dims] + np.where(
        rank[:, None, :dims] <= dims - colors[:, None], colors[:, None], colors[:, None] - dims - 1
    )
    return keys, shares


def _blur(numbers: np.ndarray, step: int) -> sparse.csr_array:
    """Adds half of the two neighbors of each corner along an axis: (M, M). numbers: corners, ascending."""
    count = len(numbers)
    parts = [sparse.eye_array(count, dtype=np.float32, format="csr")]
    for neighbor in (numbers - step, numbers + step):
        place = np.searchsorted(numbers, neighbor).clip(max=count - 1)
        exists = np.flatnonzero(numbers[place] == neighbor)
        half = np.full(len(exists), 0.5, np.float32)
        parts.append(sparse.csr_array((half, (exists, place[exists])), (count, count)))
    return sum(parts[1:], parts[0])
