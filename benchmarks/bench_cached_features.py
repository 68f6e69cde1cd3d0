"""A search over the five architectures: what does ``Pipeline(memory=...)`` save?

Runs the same GridSearchCV over `architecture_grid`, with several learning rates for every network,
without and with a cache, and counts the fits of featurizers. Prints the counts over the fewest
possible, one for each featurizer and fold, and the ratio of the times.
``python benchmarks/bench_cached_features.py``
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from sklearn.model_selection import GridSearchCV
from timing import print_ratios

from sklora import LoRACollection, LoRALayout, architecture_grid, make_architecture
from sklora.transform import DenseProduct, OAlign, SVDSpectrum, UpdateKernel

FEATURIZERS = (OAlign, SVDSpectrum, DenseProduct, UpdateKernel)
FOLDS = 3
RATES = [3e-4, 1e-3, 3e-3, 1e-2]


@contextmanager
def counted() -> Iterator[list[str]]:
    """Collect the names of the featurizers that are fitted inside the block."""
    fits: list[str] = []

    def count(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **options: Any) -> Any:
            fits.append(type(self).__name__)
            return method(self, *args, **options)

        return call

    with ExitStack() as stack:
        for kind in FEATURIZERS:
            for name in ("fit", "fit_transform"):
                stack.enter_context(patch.object(kind, name, count(getattr(kind, name))))
        yield fits


def search(X: LoRACollection, memory: str | None) -> tuple[int, float]:
    """Give the number of fits of featurizers, and the seconds."""
    networks = {"model__max_epochs": [2], "model__lr": RATES}
    grid = [
        entry if "model__alpha" in entry else entry | networks
        for entry in architecture_grid(device="cpu", random_state=0)
    ]
    pipeline = make_architecture("mlp", device="cpu", random_state=0, memory=memory)
    with counted() as fits:
        start = time.perf_counter()
        GridSearchCV(pipeline, grid, cv=FOLDS, refit=False).fit(X, np.arange(len(X)) % 2)
        return len(fits), time.perf_counter() - start


def ratios(quick: bool = False) -> dict[str, float]:
    """Give the fits without and with a cache over the fewest possible, and the ratio of times."""
    n_adapters, width, n_modules = (60, 64, 4) if quick else (100, 256, 12)
    layout = LoRALayout([(f"m{i}", width, width, 4) for i in range(n_modules)])
    flat = np.random.default_rng(0).standard_normal((n_adapters, layout.width), dtype=np.float32)
    X = LoRACollection.from_array(flat, layout)
    fewest = len(FEATURIZERS) * FOLDS
    without, slow = search(X, None)
    with tempfile.TemporaryDirectory() as folder:
        cached, fast = search(X, folder)
    return {
        "fits without memory / fewest": without / fewest,
        "fits with memory / fewest": cached / fewest,
        "seconds with memory / without": fast / slow,
    }


if __name__ == "__main__":
    print_ratios(__doc__, ratios)
