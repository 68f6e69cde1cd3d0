"""A search over the architectures fits each featurizer once per fold, if its Pipeline caches."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV

from sklora import architecture_grid, make_architecture
from sklora.transform import DenseProduct, OAlign, SVDSpectrum, UpdateKernel

FEATURIZERS = [OAlign, SVDSpectrum, DenseProduct, UpdateKernel]
FOLDS = 2


@pytest.fixture
def fits(monkeypatch):
    """How often each featurizer was fitted, by the name of its class."""
    counts = Counter()

    def counted(method):
        @functools.wraps(method)
        def call(self, *args, **options):
            counts[type(self).__name__] += 1
            return method(self, *args, **options)

        return call

    for featurizer in FEATURIZERS:
        for name in ("fit", "fit_transform"):
            monkeypatch.setattr(featurizer, name, counted(getattr(featurizer, name)))
    return counts


def search(zoo, memory):
    quick = {"model__max_epochs": [1], "model__lr": [1e-3, 1e-2, 1e-1]}
    grid = [
        entry if "model__alpha" in entry else entry | quick
        for entry in architecture_grid(device="cpu", random_state=0)
    ]
    y = np.arange(len(zoo)) % 2
    pipeline = make_architecture("mlp", device="cpu", random_state=0, memory=memory)
    return GridSearchCV(pipeline, grid, cv=FOLDS, refit=False).fit(zoo, y)


def test_featurizers_are_fitted_once_per_fold(fits, random_loras, rng, tmp_path):
    zoo = random_loras(rng, 40)
    plain = search(zoo, None).cv_results_
    assert {kind.__name__: fits[kind.__name__] for kind in FEATURIZERS} == {
        kind.__name__: 3 * FOLDS for kind in FEATURIZERS
    }
    fits.clear()
    cached = search(zoo, str(tmp_path)).cv_results_
    assert {kind.__name__: fits[kind.__name__] for kind in FEATURIZERS} == {
        kind.__name__: FOLDS for kind in FEATURIZERS
    }
    np.testing.assert_array_equal(cached["mean_test_score"], plain["mean_test_score"])
