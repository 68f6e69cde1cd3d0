"""What handwritten digits look like, by plain image processing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

ATTRIBUTES = ["loop", "symmetric", "thick", "slanted", "wide"]
ZOOM = 4  # strokes are about two pixels wide: finer steps make shapes of them
SMALLEST_HOLE = ZOOM**2 // 4
LEVELS = np.arange(1, 8) / 10  # of ink: rings of the digits are often faint at one place


def describe(image: NDArray[Any]) -> NDArray[np.float64]:
    """Describe an image ``(8, 8)`` of ink from 0 to 1, by one number for each of `ATTRIBUTES`."""
    fine = refine(image)
    slant, width = slant_and_width(image)
    return np.array([has_loop(fine), symmetry(image), thickness(fine), slant, width])


def refine(image: NDArray[Any]) -> NDArray[Any]:
    """Interpolate an image, with an edge of background around it."""
    fine: NDArray[Any] = ndimage.zoom(
        np.pad(image, 1), ZOOM, order=1, grid_mode=True, mode="grid-constant"
    )
    return fine


def has_loop(fine: NDArray[Any]) -> bool:
    """Whether there is a hole at two levels of ink or more; one alone may be a dent."""
    return sum(n_holes(fine, level) > 0 for level in LEVELS) > 1


def n_holes(fine: NDArray[Any], level: float) -> int:
    """Number of pieces of background that ink of more than this level encloses."""
    pieces, _ = ndimage.label(fine <= level)
    sizes = np.bincount(pieces.ravel())
    sizes[[0, pieces[0, 0]]] = 0  # the ink, and the background at the image's edge
    return int((sizes >= SMALLEST_HOLE).sum())


def symmetry(image: NDArray[Any]) -> float:
    """Share of the ink that falls on ink when the image is mirrored, left for right."""
    columns = np.flatnonzero(image.max(axis=0) > 0.25)
    ink = image[:, columns[0] : columns[-1] + 1]
    return float(np.minimum(ink, ink[:, ::-1]).sum() / ink.sum())


def thickness(fine: NDArray[Any]) -> float:
    """Width of strokes in pixels: a quarter of it is the mean distance of ink from the edge."""
    ink = fine > 0.5
    return float(4 * ndimage.distance_transform_edt(ink)[ink].mean() / ZOOM)


def slant_and_width(image: NDArray[Any]) -> tuple[float, float]:
    """How far the top leans to the right, per unit of height, and width over height."""
    (y, x), weights = np.indices(image.shape).reshape(2, -1), image.ravel()
    cov = np.cov(x, y, aweights=weights)
    return float(-cov[0, 1] / cov[1, 1]), float(np.sqrt(cov[0, 0] / cov[1, 1]))
