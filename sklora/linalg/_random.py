"""Random matrices that make both sides of updates small."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import DTypeLike, NDArray


def gaussian_projections(
    shapes: Iterable[tuple[int, int]],
    n_components: int,
    rng: np.random.RandomState,
    dtype: DTypeLike = np.float64,
) -> Iterator[tuple[NDArray[np.floating], NDArray[np.floating]]]:
    r"""Draw matrices for the two sides of every update: ``dW`` becomes ``P dW Q^T``.

    Entries are Gaussian of variance ``1 / n_components``, so that :math:`E[P^\top P] = I`: on
    average, inner products of projected updates are those of the updates. A side that has no more
    than `n_components` rows is left as it is.

    Parameters
    ----------
    shapes : iterable of (n, m)
        Of the updates.
    n_components : int
        Rows to keep on either side.
    rng : RandomState
    dtype : dtype, default=float64
        Of the matrices; they are drawn in float64 whatever it is.

    Yields
    ------
    P : ndarray of shape (min(n_components, n), n)
        Its columns are contiguous, as :func:`sklora.linalg._tall.project` wants them.
    Q : ndarray of shape (min(n_components, m), m)

    Examples
    --------
    >>> import numpy as np
    >>> from sklora.linalg._random import gaussian_projections
    >>> [(P, Q)] = gaussian_projections([(50, 2)], 3, np.random.RandomState(0))
    >>> P.shape, Q.tolist()
    ((3, 50), [[1.0, 0.0], [0.0, 1.0]])
    """

    def draw(size: int) -> NDArray[np.floating]:
        if size <= n_components:
            return np.eye(size, dtype=dtype, order="F")
        gaussian: NDArray[np.floating] = rng.standard_normal((n_components, size))
        gaussian /= np.sqrt(n_components)
        return gaussian.astype(dtype, order="F", copy=False)

    for n, m in shapes:
        yield draw(n), draw(m)
