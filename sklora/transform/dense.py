"""The dense architecture's features: every entry of every update, or what stands for them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor

from sklora._base import as_tensor
from sklora.collection import LoRACollection, LoRALayout
from sklora.linalg import dense_product
from sklora.linalg._factors import column_signs, product_size
from sklora.linalg._tall import project
from sklora.transform._base import WeightsToFeatures
from sklora.transform._blocks import check_results
from sklora.transform._pairs import (
    KeepsTraining,
    as_dtype_of,
    inner_products,
    sum_over_modules,
)
from sklora.transform.projection import draw_sides

_SKETCH_COMPONENTS = 32


class DenseProduct(KeepsTraining, WeightsToFeatures):
    r"""All entries of every update :math:`U V^\top`, or fewer numbers with their inner products.

    They are invariant to GL(r). The entries keep everything that the adapter does. There are
    ``n m`` of them for every module, so for large modules take another method.

    Parameters
    ----------
    method : {"exact", "gram", "sketch"}, default="exact"
        ``"exact"`` gives the entries, row by row: ``n m`` of them for every module.

        ``"gram"`` gives coordinates of all updates together, as one vector, in the span of the
        training updates: those that principal component analysis without centring would give, found
        from inner products of updates alone. Between training adapters, and between these and any
        other, inner products are those of the entries, so that a learner that ignores rotations,
        such as ridge regression, a support vector machine or k nearest neighbours, learns what it
        would from the entries. A perceptron does not ignore them, and wants few coordinates.

        ``"sketch"`` gives the entries of :math:`S_1 U (S_2 V)^\top`, with fixed Gaussian matrices
        for every module. Inner products are those of the updates on average over the draw.
    n_components : int or None, default=None
        For ``"gram"``, how many leading coordinates to give at most; ``None`` for all, at most one
        for each training adapter. For ``"sketch"``, rows of the matrices, whose entries have
        variance ``1 / n_components``; 32 by default. A side with no more rows is left as it is.
        ``"exact"`` ignores it.
    random_state : int, RandomState instance or None, default=None
        Draws the matrices of ``"sketch"``.
    device : str or torch.device, default="auto"
        Where to compute. ``"auto"`` uses CUDA if there is one.
    n_jobs : int or None, default=None
        Blocks of adapters to work on at once, in threads.
    verbose : int, default=0
        With 1 or more there is a progress bar, if standard error is a terminal.
    layout : LoRALayout or None, default=None
        What the columns of a plain array mean. ``None`` takes each row for one update of shape
        ``(n_features, 1)``, whose entries are the row. Collections bring their own.

    Attributes
    ----------
    eigenvalues_ : ndarray of shape (n_coordinates,)
        For ``"gram"``: squared lengths of the training updates along each coordinate, largest
        first.
    eigenvectors_ : ndarray of shape (n_training, n_coordinates)
        For ``"gram"``: of the matrix of inner products of training updates.
    left_ : dict of str to ndarray of shape (min(n_components, n), n)
        For ``"sketch"``: ``S1`` of every module, by name.
    right_ : dict of str to ndarray of shape (min(n_components, m), m)
        For ``"sketch"``: ``S2`` of every module, by name.
    layout_ : LoRALayout
        Modules seen by `fit`.
    n_features_in_ : int
        Width of X seen by `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Only when X was a data frame with string column names.

    See Also
    --------
    sklora.linalg.dense_product : The entries.
    sklora.linalg.pairwise_inner_products : The inner products.
    UpdateKernel : The inner products themselves, their cosines or a Gaussian of the distances.
    GLEquivariantProjection : Makes updates smaller, in front of any other step.
    SVDSpectrum : The singular values of the updates alone.

    Notes
    -----
    Adapters of any rank can be transformed. Names of the columns are ``{module}:{row},{column}``,
    with ``"gram"`` ``denseproduct0``, ``denseproduct1``, ...; side features follow under their own
    names.

    Entries are right to the rounding of the factors, which grows with the condition of the gauge.
    Where a module does the same in all training adapters, in factors of float32 that differ, its
    entries differ by that rounding alone. A learner that standardises them, such as
    :class:`MLPNetClassifier`, learns from it, and depends on the gauge; the spectrum and GL-net do
    not.

    The coordinates of a new adapter leave out what it does outside the span. Linear models and
    nearest neighbours still predict what they would from the entries. But its distances are too
    small, all squares by the same amount: for Gaussian kernels, take :class:`UpdateKernel`.

    With ``"gram"`` a pair of adapters takes ``2 (n + m) r^2`` operations a module, against ``n m``
    numbers that ``"exact"`` writes, and the work takes scikit-learn's ``working_memory`` beside the
    matrix of inner products in float64. The estimator keeps the training adapters: without a copy
    while X is in memory or in files, and with their weights when it is pickled. An eigenvalue says
    nothing and is left out if it is no more than ``n_training e`` times the largest, or than ``e``
    times the sum of all :math:`(\sum_k \|u_k\| \|v_k\|)^2` over columns, which is large where
    gauges are bad. For weights in float64, ``e`` is the rounding of inner products, 2.2e-16.
    Weights in float32 are rounded more, by 1.2e-7; since an eigenvalue is the square of a length,
    ``e`` is then the square of that, 1.4e-14.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora.collection import LoRACollection
    >>> from sklora.transform import DenseProduct
    >>> U, V = np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]])
    >>> X = LoRACollection.from_factors([{"q": (U, V)}, {"q": (-2 * U, V)}])
    >>> dense = DenseProduct()
    >>> dense.fit_transform(X)
    array([[  3.,   4.,   6.,   8.],
           [ -6.,  -8., -12., -16.]])
    >>> dense.get_feature_names_out()
    array(['q:0,0', 'q:0,1', 'q:1,0', 'q:1,1'], dtype=object)

    The two updates span a line, on which one is at the square root of 125:

    >>> DenseProduct("gram").fit_transform(X).round(3)
    array([[-11.18 ],
           [ 22.361]])
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **WeightsToFeatures._parameter_constraints,
        "method": [StrOptions({"exact", "gram", "sketch"})],
        "n_components": [None, Interval(Integral, 1, None, closed="left")],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        method: str = "exact",
        n_components: int | None = None,
        *,
        random_state: int | np.random.RandomState | None = None,
        device: str | torch.device = "auto",
        n_jobs: int | None = None,
        verbose: int = 0,
        layout: LoRALayout | None = None,
    ) -> None:
        self.method = method
        self.n_components = n_components
        self.random_state = random_state
        self.device = device
        self.n_jobs = n_jobs
        self.verbose = verbose
        self.layout = layout

    @property
    def _checks_results(self) -> bool:  # type: ignore[override]
        return self.method != "gram"

    def _fit(self, X: LoRACollection) -> None:
        for learned in ("_training", "eigenvalues_", "eigenvectors_", "left_", "right_"):
            self.__dict__.pop(learned, None)
        if self.method == "gram":
            self._fit_gram(X)
        elif self.method == "sketch":
            n_components = self.n_components or _SKETCH_COMPONENTS
            self.left_, self.right_ = draw_sides(X, n_components, self.random_state)

    def _fit_gram(self, X: LoRACollection) -> None:
        products = inner_products(X, device=self.device, n_jobs=self.n_jobs, verbose=self.verbose)
        sizes = sum_over_modules(_squared_size, X, device=self.device, n_jobs=self.n_jobs)
        check_results(X, np.column_stack([products.diagonal(), sizes]))
        values, vectors = (A.flip(-1) for A in torch.linalg.eigh(torch.from_numpy(products)))
        rounding = max(np.finfo(np.float64).eps, float(np.finfo(X.dtype).eps) ** 2)
        size = max(len(X) * float(values[0]), float(sizes.sum()))
        n_coordinates = int((values > rounding * size).sum())
        if self.n_components is not None:
            n_coordinates = min(n_coordinates, self.n_components)
        # One coordinate stays where all updates are zero: no learner takes none.
        kept = slice(max(1, n_coordinates))
        self._training = X
        self.eigenvalues_ = values[kept].clamp(min=0).numpy()
        vectors = vectors[:, kept]
        self.eigenvectors_ = (vectors * column_signs(vectors)).numpy()

    def _transform(self, X: LoRACollection) -> NDArray[Any]:
        if self.method != "gram":
            return super()._transform(X)
        products = inner_products(
            *(X, self._training), device=self.device, n_jobs=self.n_jobs, verbose=self.verbose
        )
        lengths = np.sqrt(self.eigenvalues_)
        coordinates = products @ self.eigenvectors_
        np.divide(coordinates, lengths, out=coordinates, where=lengths > 0)
        return self._with_side(coordinates, X)

    def _transform_training(self, X: LoRACollection) -> NDArray[Any]:
        if self.method != "gram":
            return self._transform(X)
        return self._with_side(self.eigenvectors_ * np.sqrt(self.eigenvalues_), X)

    def _with_side(self, coordinates: NDArray[np.float64], X: LoRACollection) -> NDArray[Any]:
        features = as_dtype_of(X, coordinates)
        if not X.layout.n_side:
            return features
        return np.hstack([features, X[:, X.layout.side_slice]])

    def _column_names(self) -> list[str]:
        coordinates = range(len(self.eigenvalues_) if self.method == "gram" else 0)
        return [f"denseproduct{position}" for position in coordinates] + super()._column_names()

    def _feature_counts(self) -> list[int]:
        shapes = map(self._feature_shape, range(self.layout_.n_modules))
        return [rows * columns for rows, columns in shapes]

    def _feature_names(self, position: int) -> Sequence[str]:
        rows, columns = self._feature_shape(position)
        return [f"{row},{column}" for row in range(rows) for column in range(columns)]

    def _feature_shape(self, position: int) -> tuple[int, int]:
        """Rows and columns of what a module gives."""
        name, n, m, _ = self.layout_.modules[position]
        if self.method == "sketch":
            return len(self.left_[name]), len(self.right_[name])
        return (n, m) if self.method == "exact" else (0, 0)

    def _module_features(self, positions: Sequence[int], U: Tensor, V: Tensor) -> Tensor:
        if self.method == "sketch":
            name = self.layout_.names[positions[0]]
            U, V = (
                project(as_tensor(matrices[name]).to(A), A[0])[None]
                for matrices, A in ((self.left_, U), (self.right_, V))
            )
        return dense_product(U, V).flatten(-2)


def _squared_size(U: Tensor, V: Tensor) -> Tensor:
    """Give what the rounding of a squared norm is relative to: the worse the gauge, the larger."""
    return product_size(U, V).square()
