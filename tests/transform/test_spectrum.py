import numpy as np
import pytest

from sklora.testing import apply_gauge, assert_gauge_invariant
from sklora.transform import SVDSpectrum


def test_features_are_the_singular_values_of_every_update(X, updates):
    features = SVDSpectrum().fit_transform(X)
    assert features.shape == (9, 12)
    for position in range(X.layout.n_modules):
        expected = np.linalg.svd(updates(X, position), compute_uv=False)[:, :3]
        np.testing.assert_allclose(features[:, 3 * position : 3 * position + 3], expected)


def test_names(X):
    names = SVDSpectrum(2).fit(X).get_feature_names_out()
    assert names.tolist() == [f"m{i}:s{j}" for i in range(4) for j in range(2)]


@pytest.mark.parametrize(
    ("dtype", "condition", "rtol"), [(np.float64, 1e4, 1e-9), (np.float32, 1e2, 1e-4)]
)
def test_is_invariant_to_gl(random_loras, rng, dtype, condition, rtol):
    X = random_loras(rng, 9, rank=3, dtype=dtype)
    assert_gauge_invariant(SVDSpectrum(), X, condition=condition, rtol=rtol, random_state=0)


def test_mixed_ranks_are_invariant_and_padded_with_zeros(mixed, updates):
    assert_gauge_invariant(SVDSpectrum(), mixed, condition=1e4, rtol=1e-9, random_state=0)
    features = SVDSpectrum().fit_transform(mixed).reshape(9, 4, 3)
    beyond = np.arange(3) >= mixed.ranks[..., None]
    np.testing.assert_allclose(features[beyond], 0, atol=1e-14)
    assert (features[~beyond] > 1e-3).all()


@pytest.mark.parametrize("n_adapters", [1, 5])
def test_a_large_rank_is_no_work_for_the_others(random_loras, rng, monkeypatch, n_adapters):
    """Ranks of as many binary digits are worked on together, without the room for larger ones."""
    X = random_loras(rng, 5, ((9, 8), (9, 8)), [[1, 2], [8, 8], [3, 0], [1, 1], [2, 3]])
    sizes = []
    watched = SVDSpectrum._module_features

    def features(self, positions, U, V):
        sizes.append((len(positions), *U.shape[1::2]))
        return watched(self, positions, U, V)

    spectra = SVDSpectrum().fit(X)
    expected = spectra.transform(X)
    monkeypatch.setattr(SVDSpectrum, "_module_features", features)
    np.testing.assert_allclose(spectra.transform(X[:n_adapters]), expected[:n_adapters])
    # Of how many modules and adapters, up to which rank.
    if n_adapters == 1:
        assert sizes == [(1, 1, 1), (1, 1, 2)]
    else:
        assert sizes == [(2, 1, 1), (2, 3, 3), (2, 1, 8)]


def test_modules_of_one_shape_keep_their_own_number_of_values(random_loras, rng, updates):
    X = random_loras(rng, 6, ((6, 4), (6, 4)), [[1, 3]] * 6)
    spectra = SVDSpectrum().fit(X)
    assert spectra.n_values_ == (1, 3)
    features = spectra.transform(X)
    np.testing.assert_allclose(features[:, 0], np.linalg.norm(updates(X, 0), axis=(1, 2)))
    np.testing.assert_allclose(
        features[:, 1:], np.linalg.svd(updates(X, 1), compute_uv=False)[:, :3]
    )


def test_ranks_of_the_layout_count_where_no_adapter_has_them(X):
    wider = X.with_layout(X.layout.with_ranks([3, 4, 5, 3]))
    assert SVDSpectrum().fit(wider).n_values_ == (3, 4, 5, 3)


@pytest.mark.parametrize("n_values", [1, 2, 5])
def test_n_values_truncates_or_pads(X, n_values):
    full = SVDSpectrum().fit_transform(X).reshape(9, 4, 3)
    features = SVDSpectrum(n_values).fit_transform(X).reshape(9, 4, n_values)
    kept = min(n_values, 3)
    np.testing.assert_array_equal(features[..., :kept], full[..., :kept])
    assert (features[..., kept:] == 0).all()


def test_more_values_than_memory_holds_are_refused_at_once(X):
    with pytest.raises(MemoryError):
        SVDSpectrum(10**13).fit_transform(X)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_other_ranks_at_transform(X, random_loras, rng, updates, rank):
    other = random_loras(rng, 5, [module[1:3] for module in X.layout.modules], rank)
    features = SVDSpectrum().fit(X).transform(other).reshape(5, 4, 3)
    for position in range(4):
        expected = np.linalg.svd(updates(other, position), compute_uv=False)[:, :3]
        np.testing.assert_allclose(features[:, position], expected, atol=1e-13)


def test_small_singular_values_survive_float32_and_a_gauge(random_loras, rng, updates):
    """Down to 1e-6 of the largest, right to 1e-5 for the float32 weights as they are."""
    X = random_loras(rng, 30, ((40, 30),), 4, dtype=np.float32)
    flat = np.array(X)
    flat[:, :160] *= np.tile(np.float32([1, 1e-2, 1e-4, 1e-6]), 40)
    graded = type(X).from_array(flat, X.layout)
    moved = apply_gauge(graded, condition=1e2, random_state=0)
    factors = [adapter["m0"] for adapter in moved]
    dense = np.stack([U.astype(np.float64) @ V.T.astype(np.float64) for U, V in factors])
    expected = np.linalg.svd(dense, compute_uv=False)[:, :4]
    np.testing.assert_allclose(SVDSpectrum().fit_transform(moved), expected, rtol=1e-5)


@pytest.mark.parametrize("n_values", [0, 1.5, "all"])
def test_rejects_n_values(X, n_values):
    with pytest.raises(ValueError, match="n_values"):
        SVDSpectrum(n_values).fit(X)
