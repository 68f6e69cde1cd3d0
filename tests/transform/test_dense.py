import pickle

import numpy as np
import pytest
import skops.io
from sklearn.base import clone
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVR

from sklora import TRUSTED_TYPES, LoRACollection, make_architecture
from sklora._saved import ModelCard, read_model, write_model
from sklora.io._plan import ReadOptions
from sklora.testing import apply_gauge, assert_gauge_invariant
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


GAUGES = [(np.float64, 1e4, 1e-9), (np.float32, 1e2, 1e-4)]
ATOL = {np.float64: 1e-12, np.float32: 1e-5}


def test_entries_that_do_not_fit_into_memory_are_refused_with_their_size(X, monkeypatch):
    monkeypatch.setattr("sklora._stores._CERTAIN_BYTES", 0)
    monkeypatch.setattr("sklora._stores.available_memory", lambda: 100)
    with pytest.raises(
        MemoryError,
        match=r"DenseProduct gives of .* takes .* GiB are free\. Take fewer adapters, or",
    ):
        DenseProduct().fit_transform(X)


class TestGram:
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_inner_products_are_those_of_the_entries(self, random_loras, rng, dtype):
        X, new = (random_loras(rng, n, rank=r, dtype=dtype) for n, r in ((9, 2), (5, 3)))
        exact, gram = DenseProduct().fit(X), DenseProduct("gram").fit(X)
        entries, new_entries = (exact.transform(A).astype(np.float64) for A in (X, new))
        found, new_found = (gram.transform(A).astype(np.float64) for A in (X, new))
        scale = (entries**2).sum(axis=1).max()
        for one, other, expected in (
            (found, found, entries @ entries.T),
            (new_found, found, new_entries @ entries.T),
        ):
            np.testing.assert_allclose(one @ other.T, expected, rtol=0, atol=ATOL[dtype] * scale)
        # The part of a new update outside the span is gone, and no more.
        projection = new_entries @ np.linalg.pinv(entries) @ entries
        lengths = np.linalg.norm(projection, axis=1)
        np.testing.assert_allclose(np.linalg.norm(new_found, axis=1), lengths, rtol=ATOL[dtype])

    def test_coordinates_are_principal_components_without_centring(self, X):
        entries = DenseProduct().fit_transform(X)
        left, values, _ = np.linalg.svd(entries, full_matrices=False)
        gram = DenseProduct("gram").fit(X)
        np.testing.assert_allclose(gram.eigenvalues_, values**2, rtol=1e-10)
        found = gram.transform(X)
        np.testing.assert_allclose(np.abs(found), np.abs(left * values), atol=1e-10)
        assert (gram.eigenvectors_[np.abs(gram.eigenvectors_).argmax(axis=0), range(9)] > 0).all()

    @pytest.mark.parametrize("kind", ["X", "mixed", "with_side"])
    @pytest.mark.parametrize("n_components", [None, 1, 4, 100])
    def test_fit_transform_is_fit_and_transform(self, kind, n_components, request):
        X = request.getfixturevalue(kind)
        gram = DenseProduct("gram", n_components)
        found = gram.fit_transform(X)
        assert found.shape == (9, min(n_components or 9, 9) + X.layout.n_side)
        np.testing.assert_allclose(gram.transform(X), found, atol=1e-12)
        every = DenseProduct("gram").fit_transform(X)
        np.testing.assert_allclose(
            found[:, :n_components][:, :9], every[:, : n_components or 9][:, :9]
        )

    @pytest.mark.parametrize(("dtype", "condition", "rtol"), GAUGES)
    def test_is_invariant_to_gl(self, random_loras, rng, dtype, condition, rtol):
        X = random_loras(rng, 9, rank=3, dtype=dtype)
        model = DenseProduct("gram")
        assert_gauge_invariant(model, X, condition=condition, rtol=rtol, random_state=0)

    @pytest.mark.parametrize(
        ("dtype", "group", "condition"),
        [
            (np.float64, "O", 1),
            (np.float32, "O", 1),
            (np.float64, "GL", 10),
            (np.float64, "GL", 1e4),
            (np.float32, "GL", 1e2),
        ],
    )
    def test_disguises_of_an_adapter_span_one_direction(
        self, random_loras, rng, dtype, group, condition
    ):
        X = random_loras(rng, 6, rank=3, dtype=dtype)
        disguised = [apply_gauge(X, group, condition, seed).read() for seed in range(10)]
        both = LoRACollection.from_array(np.vstack([X.read(), *disguised]), X.layout)
        gram = DenseProduct("gram").fit(both)
        assert gram.eigenvalues_.shape == (6,)
        entries = DenseProduct().fit_transform(both)
        scale = (entries**2).sum(axis=1).max()
        found = gram.transform(both)
        # Inner products lose the square of the condition, as norms do.
        atol = 10 * max(ATOL[dtype], 1e-16 * condition**2) * scale
        np.testing.assert_allclose(found @ found.T, entries @ entries.T, rtol=0, atol=atol)

    @pytest.mark.parametrize(("dtype", "size"), [(np.float64, 1e-6), (np.float32, 1e-5)])
    def test_small_differences_are_kept(self, random_loras, rng, dtype, size):
        base, other = random_loras(rng, 2, rank=1)
        factors = []
        for scale in (0.0, size):
            pairs = {
                name: [np.hstack([base[name][side], scale * other[name][side]]) for side in (0, 1)]
                for name in base
            }
            # Stored as two columns: the sum of the updates, of which one is small.
            factors.append({name: (U, V / [1, scale or 1]) for name, (U, V) in pairs.items()})
        X = LoRACollection.from_factors(factors, dtype=dtype)
        assert DenseProduct("gram").fit(X).eigenvalues_.shape == (2,)

    @pytest.mark.parametrize("sizes", [(1e20, 1e-20), (1e-20, 1e20), (1e10, 1e10), (1e-12, 1e-12)])
    def test_sizes_whose_squares_float32_cannot_hold(self, random_loras, rng, sizes):
        factors = [
            {name: (sizes[0] * U, sizes[1] * V) for name, (U, V) in adapter.items()}
            for adapter in random_loras(rng, 6)
        ]
        X = LoRACollection.from_factors(factors * 2, dtype=np.float32)
        gram = DenseProduct("gram")
        found = gram.fit_transform(X)
        assert gram.eigenvalues_.shape == (6,)
        np.testing.assert_allclose(gram.transform(X), found, rtol=0, atol=1e-6 * found.max())

    def test_zero_updates(self, random_loras, rng):
        X = random_loras(rng, 4)
        zero = LoRACollection.from_array(np.zeros((3, X.layout.width)), X.layout)
        gram = DenseProduct("gram")
        np.testing.assert_array_equal(gram.fit_transform(zero), np.zeros((3, 1)))
        np.testing.assert_array_equal(gram.transform(X), np.zeros((4, 1)))
        np.testing.assert_array_equal(DenseProduct("gram").fit(X).transform(zero), np.zeros((3, 4)))

    @pytest.mark.parametrize(
        "learner",
        [
            Ridge(fit_intercept=False),
            Ridge(),
            SVR(gamma=0.01),
            KNeighborsRegressor(3),
            GaussianProcessRegressor(RBF(10.0), optimizer=None, alpha=1e-3),
        ],
        ids=lambda learner: type(learner).__name__,
    )
    def test_learners_see_what_they_would_of_the_entries(self, random_loras, rng, learner):
        """Where new adapters are in the span of the training adapters."""
        X = random_loras(rng, 40, ((3, 2),), 2)  # 6 entries, which 30 adapters span
        y = DenseProduct().fit_transform(X) @ rng.normal(size=6) + rng.normal(size=40)
        expected = cross_val_predict(make_pipeline(DenseProduct(), learner), X, y, cv=4)
        found = cross_val_predict(make_pipeline(DenseProduct("gram"), learner), X, y, cv=4)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("learner", "same"),
        [
            (Ridge(), True),
            (SVR(kernel="linear"), True),
            (KNeighborsRegressor(3), True),
            (SVR(gamma=0.01), False),  # distances to new adapters lack what is outside
        ],
        ids=repr,
    )
    def test_learners_outside_the_span(self, X, random_loras, rng, learner, same):
        y = rng.normal(size=9)
        new = random_loras(rng, 5, [module[1:3] for module in X.layout.modules], 3)
        expected = make_pipeline(DenseProduct(), learner).fit(X, y).predict(new)
        found = make_pipeline(DenseProduct("gram"), learner).fit(X, y).predict(new)
        assert np.allclose(found, expected, rtol=1e-6) == same

    def test_what_is_left_out_is_not_kept(self, X):
        vectors = DenseProduct("gram", 2).fit(X).eigenvectors_
        assert vectors.base.untyped_storage().nbytes() == vectors.nbytes

    def test_training_in_memory_is_not_copied(self, X):
        assert DenseProduct("gram").fit(X)._training._store is X._store
        assert DenseProduct("gram").fit(X[2:])._training._store is X._store
        flat = np.asarray(X)
        kept = DenseProduct("gram", layout=X.layout).fit(flat)._training
        assert np.shares_memory(np.asarray(kept), flat)

    @pytest.mark.parametrize("seed", range(8))
    def test_zero_updates_of_factors_that_are_not_zero(self, random_loras, rng, seed):
        """Of which what cancels leaves an eigenvalue of either sign."""
        X = random_loras(rng, 1, ((8, 7),), 2)
        flat = X.read()
        [(U, V)] = [X.layout._factors_at(flat, 0)]
        U[:, :, 1], V[:, :, 1] = U[:, :, 0], -V[:, :, 0]
        zero = LoRACollection.from_array(flat, X.layout)
        moved = apply_gauge(zero, condition=1e4, random_state=seed)
        np.testing.assert_allclose(DenseProduct("gram").fit_transform(moved), 0, atol=1e-3)

    @pytest.mark.parametrize(("size", "n_coordinates"), [(10, 1), (50, 2)])
    def test_eigenvalues_below_the_rounding_of_all_are_left_out(self, size, n_coordinates):
        rows = np.zeros((40, 2))
        rows[0, 0], rows[1, 1] = 1, np.sqrt(size * np.finfo(float).eps)
        for n_components in (None, 5):
            model = DenseProduct("gram", n_components).fit(rows)
            assert len(model.eigenvalues_) == n_coordinates

    def test_a_disguise_in_single_precision_is_no_direction_of_its_own(self):
        # One that is rounded more than most.
        U, V = np.random.default_rng(112).normal(size=(2, 2, 1)).astype(np.float32)
        disguise = U * np.float32(1.1), V / np.float32(1.1)
        X = LoRACollection.from_factors([{"q": (U, V)}, {"q": disguise}])
        assert len(DenseProduct("gram").fit(X).eigenvalues_) == 1
        double = LoRACollection.from_array(X.read().astype(float), X.layout)
        assert len(DenseProduct("gram").fit(double).eigenvalues_) == 2

    def test_a_refit_with_another_method_forgets_the_training(self, X):
        model = DenseProduct("gram").fit(X)
        model.set_params(method="sketch", random_state=0).fit(X)
        fresh = DenseProduct("sketch", random_state=0).fit(X)
        assert vars(model).keys() == vars(fresh).keys()
        model.set_params(method="gram").fit(X)
        assert vars(model).keys() == vars(DenseProduct("gram").fit(X)).keys()

    def test_a_stored_model_needs_no_files(self, mixed, tmp_path):
        path = tmp_path / "zoo.safetensors"
        mixed.save(path)
        model = DenseProduct("gram").fit(LoRACollection.open(path)[1:])
        expected = model.transform(mixed)
        stored, stored_by_skops = pickle.dumps(model), skops.io.dumps(model)
        path.unlink()
        loaded = pickle.loads(stored), skops.io.loads(stored_by_skops, trusted=TRUSTED_TYPES)
        for other in loaded:
            np.testing.assert_allclose(other.transform(mixed), expected, atol=1e-13)

    def test_a_stored_pipeline(self, X, tmp_path):
        model = make_architecture("dense", random_state=0, device="cpu")
        model.set_params(features__method="gram", model__max_epochs=1).fit(X, np.arange(9) % 2)
        card = ModelCard(
            "classification", ("y",), (0, 1), "dense", X.layout, True, (), ReadOptions(), 9
        )
        write_model(tmp_path / "m.skops", model, card)
        loaded, _ = read_model(tmp_path / "m.skops")
        np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))


class TestSketch:
    @pytest.mark.parametrize("kind", ["X", "mixed"])
    def test_features_are_those_of_projected_updates(self, kind, request, updates):
        X = request.getfixturevalue(kind)
        sketch = DenseProduct("sketch", 3, random_state=0)
        expected = [
            sketch.fit(X).left_[name] @ updates(X, position) @ sketch.right_[name].T
            for position, name in enumerate(X.layout.names)
        ]
        assert [dense.shape[1:] for dense in expected] == [(3, 3)] * 4
        expected = np.hstack([dense.reshape(9, -1) for dense in expected])
        np.testing.assert_allclose(sketch.transform(X), expected, atol=1e-12)
        names = sketch.get_feature_names_out().tolist()
        assert names[:4] == ["m0:0,0", "m0:0,1", "m0:0,2", "m0:1,0"]

    def test_small_modules_are_left_as_they_are(self, X):
        expected = DenseProduct().fit_transform(X)
        np.testing.assert_array_equal(DenseProduct("sketch").fit_transform(X), expected)
        some = DenseProduct("sketch", 4, random_state=0).fit(X)  # m0 is 6 x 4, m1 5 x 4
        np.testing.assert_array_equal(some.right_["m0"], np.eye(4))
        assert some.left_["m0"].shape == (4, 6)

    def test_inner_products_are_right_on_average(self, random_loras, rng):
        X = random_loras(rng, 3, ((20, 15), (12, 30)), 2)
        entries = DenseProduct().fit_transform(X)
        draws = []
        for seed in range(400):
            features = DenseProduct("sketch", 8, random_state=seed).fit_transform(X)
            draws.append(features @ features.T)
        error = np.std(draws, axis=0, ddof=1) / np.sqrt(len(draws))
        expected = entries @ entries.T
        # Six different numbers: none of them is four standard errors off but once in 2,600 tests.
        assert (np.abs(np.mean(draws, axis=0) - expected) < 4 * error).all()
        assert (error < 0.1 * expected.diagonal().max()).all()

    @pytest.mark.parametrize(("dtype", "condition", "rtol"), GAUGES)
    def test_is_invariant_to_gl(self, random_loras, rng, dtype, condition, rtol):
        X = random_loras(rng, 9, ((20, 15), (12, 30)), 3, dtype=dtype)
        sketch = DenseProduct("sketch", 5, random_state=0)
        assert_gauge_invariant(sketch, X, condition=condition, rtol=rtol, random_state=0)

    def test_the_seed_decides(self, X):
        sketch = DenseProduct("sketch", 3, random_state=0)
        expected = sketch.fit_transform(X)
        np.testing.assert_array_equal(clone(sketch).fit_transform(X), expected)
        other = clone(sketch).set_params(random_state=1).fit_transform(X)
        assert np.abs(other - expected).max() > 0.1

    def test_classifies(self, random_loras, rng):
        X = random_loras(rng, 60, ((40, 30),), 2)
        y = DenseProduct().fit_transform(X)[:, 0] > 0
        model = make_pipeline(DenseProduct("sketch", random_state=0), LogisticRegression())
        assert model.fit(X, y).score(X, y) > 0.9
        assert model[0].left_["m0"].shape == (32, 40)


@pytest.mark.parametrize(
    ("name", "value"), [("method", "svd"), ("n_components", 0), ("random_state", "x")]
)
def test_bad_parameters_are_named(X, name, value):
    with pytest.raises(ValueError, match=name):
        DenseProduct("gram").set_params(**{name: value}).fit(X)
