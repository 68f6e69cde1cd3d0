"""The dense architecture's features: every entry of every update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sklora.collection import LoRALayout
from sklora.linalg import dense_product
from sklora.transform._base import WeightsToFeatures


class DenseProduct(WeightsToFeatures):
    r"""All entries of every update :math:`U V^\top`, row by row.

    They are invariant to GL(r), and keep everything that the adapter does. There are ``n m`` of
    them for every module: for large modules, put :class:`GLEquivariantProjection` in front.

    Parameters
    ----------
    device : str or torch.device, default="auto"
        Where to compute. ``"auto"`` uses CUDA where there is one.
    n_jobs : int or None, default=None
        Blocks of adapters to work on at once, in threads.
    layout : LoRALayout or None, default=None
        What the columns of a plain array mean. ``None`` takes each row for one update of shape
        ``(n_features, 1)``, whose entries are the row. Collections bring their own.

    Attributes
    ----------
    layout_ : LoRALayout
        Modules seen by `fit`.
    n_features_in_ : int
        Width of X seen by `fit`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Only when X was a data frame with string column names.

    See Also
    --------
    sklora.linalg.dense_product : The computation.
    SVDSpectrum : The singular values of the updates alone.

    Notes
    -----
    Adapters of any rank can be transformed. Names of the columns are ``{module}:{row},{column}``;
    side features follow under their own names.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora.collection import LoRACollection
    >>> from sklora.transform import DenseProduct
    >>> U, V = np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]])
    >>> dense = DenseProduct()
    >>> dense.fit_transform(LoRACollection.from_factors([{"q": (U, V)}]))
    array([[3., 4., 6., 8.]])
    >>> dense.get_feature_names_out()
    array(['q:0,0', 'q:0,1', 'q:1,0', 'q:1,1'], dtype=object)
    """

    def __init__(
        self,
        *,
        device: str | torch.device = "auto",
        n_jobs: int | None = None,
        layout: LoRALayout | None = None,
    ) -> None:
        self.device = device
        self.n_jobs = n_jobs
        self.layout = layout

    def _feature_counts(self) -> list[int]:
        return [module.n * module.m for module in self.layout_.modules]

    def _feature_names(self, position: int) -> Sequence[str]:
        module = self.layout_.modules[position]
        return [f"{row},{column}" for row in range(module.n) for column in range(module.m)]

    def _module_features(self, U: Tensor, V: Tensor) -> Tensor:
        return dense_product(U, V).flatten(-2)
