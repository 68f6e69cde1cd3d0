"""Adapters of four kinds, and all featurizers."""

import numpy as np
import pytest
from sklearn.base import clone

from sklora.transform import (
    DenseProduct,
    GLEquivariantProjection,
    OAlign,
    SVDSpectrum,
    UpdateKernel,
)

SHAPES = ((6, 4), (5, 4), (6, 4), (4, 6))

FEATURIZERS = {
    "o-align": OAlign(template=0),
    "spectrum": SVDSpectrum(),
    "dense": DenseProduct(),
    "gram": DenseProduct("gram"),
    "sketch": DenseProduct("sketch", 3, random_state=0),
    "linear": UpdateKernel(),
    "cosine": UpdateKernel("cosine"),
    "rbf": UpdateKernel("rbf"),
    "random": GLEquivariantProjection(3, random_state=0),
    "hosvd": GLEquivariantProjection(3, method="hosvd"),
}
WEIGHTS = ("o-align", "random", "hosvd")
FEATURES = ("spectrum", "dense", "gram", "sketch", "linear", "cosine", "rbf")


@pytest.fixture(params=FEATURIZERS)
def featurizer(request):
    return clone(FEATURIZERS[request.param])


@pytest.fixture(params=WEIGHTS)
def to_weights(request):
    return clone(FEATURIZERS[request.param])


@pytest.fixture(params=FEATURES)
def to_features(request):
    return clone(FEATURIZERS[request.param])


@pytest.fixture
def X(random_loras, rng):
    """Nine adapters of rank 3 in four modules of three shapes."""
    return random_loras(rng, 9, SHAPES, 3, ids=[f"adapter-{i}" for i in range(9)])


@pytest.fixture
def mixed(random_loras, rng):
    """Ranks 0 to 3 that differ between adapters and modules; the first is 3 everywhere."""
    ranks = rng.integers(0, 4, size=(9, len(SHAPES)))
    ranks[0] = 3
    return random_loras(rng, 9, SHAPES, ranks)


@pytest.fixture
def with_side(random_loras, rng):
    side = [{"scale": rng.normal(size=1), "magnitude": rng.normal(size=3)} for _ in range(9)]
    return random_loras(rng, 9, SHAPES, 2, side=side)


@pytest.fixture
def updates():
    """The dense updates (N, n, m) of one module of a collection, whatever its ranks."""

    def dense(X, position):
        module = X.layout.modules[position]
        zero = np.zeros((module.n, 1)), np.zeros((module.m, 1))
        pairs = (adapter.get(module.name, zero) for adapter in X)
        return np.stack([U @ V.T for U, V in pairs])

    return dense
