import numpy as np
import pytest

from sklora.testing import assert_gauge_invariant
from sklora.transform import DenseProduct


@pytest.mark.parametrize("kind", ["X", "mixed"])
def test_features_are_the_entries_of_every_update(kind, request, updates):
    X = request.getfixturevalue(kind)
    features = DenseProduct().fit_transform(X)
    expected = [updates(X, position).reshape(9, -1) for position in range(X.layout.n_modules)]
    np.testing.assert_allclose(features, np.hstack(expected), atol=1e-13)


def test_names_go_with_the_entries(random_loras, rng, updates):
    X = random_loras(rng, 3, ((2, 3), (3, 1)), 1)
    dense = DenseProduct().fit(X)
    names = dense.get_feature_names_out().tolist()
    assert names[:4] == ["m0:0,0", "m0:0,1", "m0:0,2", "m0:1,0"]
    assert names[6:] == ["m1:0,0", "m1:1,0", "m1:2,0"]
    column = dense.transform(X)[:, names.index("m0:1,2")]
    np.testing.assert_allclose(column, updates(X, 0)[:, 1, 2])


@pytest.mark.parametrize(
    ("dtype", "condition", "rtol"), [(np.float64, 1e4, 1e-9), (np.float32, 1e2, 1e-4)]
)
def test_is_invariant_to_gl(random_loras, rng, dtype, condition, rtol):
    X = random_loras(rng, 9, rank=3, dtype=dtype)
    assert_gauge_invariant(DenseProduct(), X, condition=condition, rtol=rtol, random_state=0)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_any_rank_at_transform(X, random_loras, rng, updates, rank):
    other = random_loras(rng, 5, [module[1:3] for module in X.layout.modules], rank)
    features = DenseProduct().fit(X).transform(other)
    np.testing.assert_allclose(features[:, :24], updates(other, 0).reshape(5, -1), atol=1e-13)
