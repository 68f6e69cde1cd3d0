"""Kernels between updates, for every learner that takes a precomputed one."""

from __future__ import annotations

from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._param_validation import Interval, StrOptions

from sklora.collection import LoRACollection, LoRALayout
from sklora.linalg import squared_norm
from sklora.transform._base import Featurizer
from sklora.transform._blocks import check_results
from sklora.transform._pairs import KeepsTraining, as_dtype_of, inner_products, sum_over_modules


class UpdateKernel(KeepsTraining, Featurizer):
    r"""Kernel between the updates of adapters and those of the training adapters.

    With :math:`\Delta W_a` all updates :math:`U V^\top` of adapter :math:`a` as one vector, the
    kernel is :math:`\langle \Delta W_a, \Delta W_b \rangle`, its cosine, or
    :math:`\exp(-\gamma \|\Delta W_a - \Delta W_b\|^2)`. It comes from products of factors alone, at
    ``O((n + m) r^2)`` a pair and module, and is invariant to GL(r).

    Parameters
    ----------
    kernel : {"linear", "cosine", "rbf"}, default="linear"
        The cosine with an update that is zero is zero.
    gamma : float or None, default=None
        Of ``"rbf"``. ``None`` is one over the mean squared norm of the training updates: adapters
        come in any scale, so that no constant would do.
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
    gamma_ : float
        The value of `gamma` that ``"rbf"`` uses.
    layout_ : LoRALayout
        Modules seen by `fit`.
    n_features_in_ : int
        Width of X seen by `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Only when X was a data frame with string column names.

    See Also
    --------
    pairwise_update_kernel : The same as a function.
    DenseProduct : With ``method="gram"``, coordinates with these inner products.

    Notes
    -----
    Put it before a learner with ``kernel="precomputed"``, in one pipeline: cross-validation then
    fits it on training adapters alone. Adapters of any rank can be transformed. Side features are
    no part of the kernel. There is one column for each training adapter: ``updatekernel0``,
    ``updatekernel1``, ...

    The estimator keeps the training adapters: without a copy while X is in memory or in files, and
    with their weights when it is pickled. Beside the kernel, the work takes scikit-learn's
    ``working_memory``.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.model_selection import cross_val_score
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.svm import SVC
    >>> from sklora import LoRACollection, UpdateKernel
    >>> rng = np.random.default_rng(0)
    >>> y = np.arange(40) % 2
    >>> X = LoRACollection.from_factors(
    ...     {"q": (rng.normal(size=(8, 1)) + 2 * label, rng.normal(size=(6, 1)) + 2 * label)}
    ...     for label in y
    ... )
    >>> model = make_pipeline(UpdateKernel("cosine"), SVC(kernel="precomputed"))
    >>> bool(cross_val_score(model, X, y).mean() > 0.9)
    True
    """

    _checks_results = False
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **Featurizer._parameter_constraints,
        "kernel": [StrOptions({"linear", "cosine", "rbf"})],
        "gamma": [None, Interval(Real, 0, None, closed="left")],
    }

    def __init__(
        self,
        kernel: str = "linear",
        *,
        gamma: float | None = None,
        device: str | torch.device = "auto",
        n_jobs: int | None = None,
        verbose: int = 0,
        layout: LoRALayout | None = None,
    ) -> None:
        self.kernel = kernel
        self.gamma = gamma
        self.device = device
        self.n_jobs = n_jobs
        self.verbose = verbose
        self.layout = layout

    def _fit(self, X: LoRACollection) -> None:
        self._training = X
        self._norms = self._squared_norms(X)
        check_results(X, self._norms[:, None])
        scale = 1 / (float(self._norms.mean()) or 1.0)
        self.gamma_ = scale if self.gamma is None else float(self.gamma)

    def _transform(self, X: LoRACollection) -> NDArray[Any]:
        products = self._products(X, self._training)
        return as_dtype_of(X, self._kernel(products, self._squared_norms(X), self._norms))

    def _transform_training(self, X: LoRACollection) -> NDArray[Any]:
        products = self._products(X)
        # The diagonal makes distances to oneself exactly zero, and may be below zero by rounding.
        norms = products.diagonal().copy() if self.kernel == "rbf" else self._norms
        return as_dtype_of(X, self._kernel(products, norms, norms))

    def _products(self, *collections: LoRACollection) -> NDArray[np.float64]:
        return inner_products(
            *collections, device=self.device, n_jobs=self.n_jobs, verbose=self.verbose
        )

    def _squared_norms(self, X: LoRACollection) -> NDArray[np.float64]:
        return sum_over_modules(squared_norm, X, device=self.device, n_jobs=self.n_jobs)

    def _column_names(self) -> list[str]:
        return [f"updatekernel{position}" for position in range(len(self._training))]

    def _kernel(
        self,
        products: NDArray[np.float64],
        norms: NDArray[np.float64],
        training_norms: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """The kernel, in place of inner products that are not needed after."""
        if self.kernel == "cosine":
            for values, squares in ((products.T, norms), (products, training_norms)):
                lengths = np.sqrt(squares)
                np.divide(values, lengths, out=values, where=lengths > 0)
                values[:, lengths == 0] = 0.0
        elif self.kernel == "rbf":
            products *= -2
            products += norms[:, None]
            products += training_norms
            np.exp(-self.gamma_ * products.clip(min=0, out=products), out=products)
        return products


def pairwise_update_kernel(
    X: LoRACollection | ArrayLike,
    Y: LoRACollection | ArrayLike | None = None,
    kernel: str = "linear",
    *,
    gamma: float | None = None,
    device: str | torch.device = "auto",
    n_jobs: int | None = None,
) -> NDArray[Any]:
    """Kernel between the updates of every adapter of X and every one of Y.

    Parameters
    ----------
    X : LoRACollection or array-like of shape (n_adapters_X, width)
        Each row of a plain array is one update of shape ``(width, 1)``.
    Y : LoRACollection or array-like of shape (n_adapters_Y, width), or None, default=None
        Of the same modules; ranks may differ. None is X.
    kernel : {"linear", "cosine", "rbf"}, default="linear"
    gamma : float or None, default=None
        Of ``"rbf"``. ``None`` is one over the mean squared norm of the updates of Y.
    device : str or torch.device, default="auto"
        Where to compute. ``"auto"`` uses CUDA if there is one.
    n_jobs : int or None, default=None
        As for :class:`UpdateKernel`.

    Returns
    -------
    ndarray of shape (n_adapters_X, n_adapters_Y)
        Of the dtype of X.

    Raises
    ------
    ValueError
        When X or Y is not valid, they differ in modules, or there is no such kernel.
    MemoryError
        When the matrix does not fit into memory.

    See Also
    --------
    UpdateKernel : The same for pipelines; it says more about the kernels.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora import LoRACollection, pairwise_update_kernel
    >>> U, V = np.array([[3.0], [0.0]]), np.ones((1, 1))
    >>> X = LoRACollection.from_factors([{"q": (U, V)}, {"q": (U[::-1], V)}, {"q": (2 * U, -V)}])
    >>> pairwise_update_kernel(X, kernel="cosine")
    array([[ 1.,  0., -1.],
           [ 0.,  1.,  0.],
           [-1.,  0.,  1.]])
    """
    update_kernel = UpdateKernel(kernel, gamma=gamma, device=device, n_jobs=n_jobs)
    update_kernel.set_output(transform="default")
    result = update_kernel.fit_transform(X) if Y is None else update_kernel.fit(Y).transform(X)
    return result  # type: ignore[no-any-return]
