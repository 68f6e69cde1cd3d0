"""The svd architecture's features: singular values of every update."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, ClassVar

import torch
from sklearn.utils._param_validation import Interval
from torch import Tensor

from sklora.collection import LoRACollection, LoRALayout
from sklora.linalg import spectrum
from sklora.transform._base import WeightsToFeatures


class SVDSpectrum(WeightsToFeatures):
    r"""Singular values of every update, largest first (the paper's section 3.2).

    The features of a module are :math:`\sigma_1 \ge \sigma_2 \ge \ldots` of :math:`U V^\top`, found
    from the factors in float64 without forming the update. They are invariant to GL(r), and to
    orthogonal changes of basis on either side of the module.

    Parameters
    ----------
    n_values : int or None, default=None
        How many singular values to give for every module: further ones are left out, missing ones
        are zero. ``None`` takes the largest rank of the module in the layout seen by `fit`.
    device : str or torch.device, default="auto"
        Where to compute. ``"auto"`` uses CUDA if there is one.
    n_jobs : int or None, default=None
        Blocks of adapters to work on at once, in threads.
    verbose : int, default=0
        With 1 or more there is a progress bar, if standard error is a terminal.
    layout : LoRALayout or None, default=None
        What the columns of a plain array mean. ``None`` takes each row for one update of shape
        ``(n_features, 1)``. Collections bring their own.

    Attributes
    ----------
    layout_ : LoRALayout
        Modules seen by `fit`.
    n_values_ : tuple of int
        Singular values per module.
    n_features_in_ : int
        Width of X seen by `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Only when X was a data frame with string column names.

    See Also
    --------
    sklora.linalg.spectrum : The computation.
    DenseProduct : All entries of the updates.

    Notes
    -----
    Adapters of any rank can be transformed. Names of the columns are ``{module}:s0``,
    ``{module}:s1``, ...; side features follow under their own names.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora.collection import LoRACollection
    >>> from sklora.transform import SVDSpectrum
    >>> U = np.array([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> X = LoRACollection.from_factors([{"q": (U, np.eye(2))}, {"q": (2 * U, np.eye(2))}])
    >>> spectra = SVDSpectrum()
    >>> spectra.fit_transform(X)
    array([[3., 1.],
           [6., 2.]])
    >>> spectra.get_feature_names_out()
    array(['q:s0', 'q:s1'], dtype=object)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **WeightsToFeatures._parameter_constraints,
        "n_values": [None, Interval(Integral, 1, None, closed="left")],
    }
    _stacks = True

    def __init__(
        self,
        n_values: int | None = None,
        *,
        device: str | torch.device = "auto",
        n_jobs: int | None = None,
        verbose: int = 0,
        layout: LoRALayout | None = None,
    ) -> None:
        self.n_values = n_values
        self.device = device
        self.n_jobs = n_jobs
        self.verbose = verbose
        self.layout = layout

    def _fit(self, X: LoRACollection) -> None:
        ranks = X.layout.ranks
        self.n_values_ = ranks if self.n_values is None else (int(self.n_values),) * len(ranks)

    def _feature_counts(self) -> list[int]:
        return [*self.n_values_]

    def _feature_names(self, position: int) -> Sequence[str]:
        return [f"s{i}" for i in range(self.n_values_[position])]

    def _module_features(self, positions: Sequence[int], U: Tensor, V: Tensor) -> Tensor:
        return spectrum(U, V)
