"""dense without the entries: how fast are inner products of updates, and what do they predict?

First, `DenseProduct("gram")` on 64 adapters against the products of all columns of the factors in
float64, by one matmul for each side of each module. Then both routes of dense on the bundled zoo:
which digits an adapter was trained on, by the perceptron on the entries and by ridge regression
with the cosine kernel, whose alpha is chosen by three inner folds. ``python
benchmarks/bench_dense.py``
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import make_scorer
from sklearn.model_selection import GridSearchCV, KFold, cross_validate
from timing import seconds

from sklora import DenseProduct, LoRACollection, LoRALayout, architecture_grid, make_architecture
from sklora.datasets import load_digits_loras


def zoo(n: int, rank: int, n_modules: int) -> LoRACollection:
    """64 adapters with normal factors of modules of shape (n, n)."""
    layout = LoRALayout([(f"m{i}", n, n, rank) for i in range(n_modules)])
    flat = np.random.default_rng(0).standard_normal((64, layout.width), np.float32)
    ranks = np.full((64, n_modules), rank)
    return LoRACollection.from_array(flat, layout, ranks=ranks)


def products_of_columns(X: LoRACollection) -> None:
    """What a Gram matrix of the updates is made of, as two matmuls a module."""
    flat = torch.from_numpy(np.asarray(X))
    for (_, n, m, r), sides in zip(X.layout.modules, X.layout.factor_slices, strict=True):
        for size, side in zip((n, m), sides, strict=True):
            columns = flat[:, side].view(-1, size, r).permute(0, 2, 1).reshape(-1, size).double()
            columns @ columns.mT


def ratio(X: LoRACollection, repeats: int) -> float:
    """Median of the ratios of the times, measured in turn."""
    gram = DenseProduct("gram", device="cpu")
    times = np.array(
        [[seconds(gram.fit_transform, X), seconds(products_of_columns, X)] for _ in range(repeats)]
    )
    return float(np.median(times[:, 0] / times[:, 1]))


def ratios(quick: bool = False) -> dict[str, float]:
    """Time of gram over that of the bare products, by width and rank."""
    sizes = [(768, 4, 2)] if quick else [(768, 4, 8), (4096, 4, 8), (4096, 32, 2), (12288, 4, 8)]
    return {
        f"gram / products of columns, n={n}, r={r}": ratio(zoo(n, r, k), 3 if quick else 5)
        for n, r, k in sizes
    }


def routes() -> None:
    """Print share of right labels and seconds of both routes of dense, over five folds."""
    digits = load_digits_loras()
    right = make_scorer(lambda y, predicted: float(np.mean(y == predicted)))
    perceptron = make_architecture("dense", device="cpu", random_state=0)
    *_, entry = architecture_grid(device="cpu", random_state=0)
    ridge = GridSearchCV(perceptron, [entry], scoring=right, cv=3)
    folds = KFold(5, shuffle=True, random_state=0)
    for name, model in (("perceptron", perceptron), ("cosine kernel ridge", ridge)):
        done = cross_validate(model, digits.data, digits.presence, cv=folds, scoring=right)
        accuracy, fit = done["test_score"].mean(), done["fit_time"].mean()
        print(f"{name:20} accuracy {accuracy:.3f}, {fit:5.1f} s a fit")


def main() -> None:
    """Print both."""
    for name, value in ratios().items():
        print(f"{name:45}{value:6.2f}")
    routes()


if __name__ == "__main__":
    main()
