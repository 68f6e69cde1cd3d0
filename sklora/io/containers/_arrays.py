"""From the bytes of a file to an array, with the bounds checked by NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklora._untrusted import Refusal
from sklora.io._tensors import DTYPES, TensorInfo


def as_array(
    raw: bytes | bytearray,
    info: TensorInfo,
    offset: int = 0,
    strides: tuple[int, ...] | None = None,
    dtype: np.dtype[Any] | None = None,
) -> NDArray[Any]:
    """View bytes as an array.

    Parameters
    ----------
    raw : bytes or bytearray
    info : TensorInfo
        The dtype and shape of the array.
    offset : int, default=0
        Where in `raw` its first number begins.
    strides : tuple of int or None, default=None
        In bytes; None for C order.
    dtype : numpy.dtype or None, default=None
        How the numbers are stored, if not as `info` says; they are converted.

    Returns
    -------
    ndarray of shape ``info.shape``

    Raises
    ------
    Refusal
        When the array would reach past the bytes, or has sizes that no array can have.
    """
    target = DTYPES[info.dtype]
    stored = target if dtype is None else dtype
    # A byte that is neither 0 nor 1 makes no bool: NumPy would compute nonsense with it.
    as_bytes = np.dtype(np.uint8) if stored.kind == "b" else stored
    try:
        array = np.ndarray(info.shape, as_bytes, raw, offset, strides)
    except ValueError as error:
        raise Refusal(f"shape {info.shape} of {info.dtype} makes no array: {error}.") from error
    return array != 0 if stored.kind == "b" else array.astype(target, copy=False)
