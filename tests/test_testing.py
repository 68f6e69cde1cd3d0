import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler

from sklora import DenseProduct, SVDSpectrum
from sklora.collection import LoRACollection, LoRALayout
from sklora.testing import (
    apply_gauge,
    assert_gauge_equivariant,
    assert_gauge_invariant,
    random_gauge,
)


def updates(X):
    """The dense updates of all modules, side by side: invariant to GL(r)."""
    products = [U @ V.swapaxes(-1, -2) for U, V in X.factors()]
    return np.hstack([product.reshape(len(X), -1) for product in products])


def grams(X):
    """U U^T of all modules: invariant to O(r) only."""
    return np.hstack([(U @ U.swapaxes(-1, -2)).reshape(len(X), -1) for U, _ in X.factors()])


def factors(X):
    return np.asarray(X)


class TestRandomGauge:
    @pytest.mark.parametrize("rank", [2, 3, 8])
    @pytest.mark.parametrize("condition", [1.0, 100.0, 1e4])
    def test_the_condition_is_exact(self, rank, condition):
        R = random_gauge(rank, condition=condition, size=5, random_state=0)
        np.testing.assert_allclose(np.linalg.cond(R), condition, rtol=1e-6)

    def test_singular_values_are_evenly_spaced(self):
        values = np.linalg.svd(random_gauge(3, condition=100, size=1000, random_state=0)).S
        np.testing.assert_allclose(
            values / values[:, [1]], np.broadcast_to([10, 1, 0.1], (1000, 3))
        )
        assert 0.1 < values[:, 1].min() < 0.12
        assert 8 < values[:, 1].max() < 10

    @pytest.mark.parametrize("rank", [1, 4])
    def test_orthogonal(self, rank):
        R = random_gauge(rank, group="O", size=(6, 5), random_state=0)
        np.testing.assert_allclose(R @ R.mT, np.broadcast_to(np.eye(rank), R.shape), atol=1e-12)

    @pytest.mark.parametrize("group", ["GL", "O"])
    def test_both_determinants_occur(self, group):
        signs = np.sign(np.linalg.det(random_gauge(3, group=group, size=50, random_state=0)))
        assert set(signs) == {-1, 1}

    def test_orthogonal_matrices_are_uniform(self):
        # The second moments of Haar measure: entries are uncorrelated, with variance 1 / r.
        R = random_gauge(3, group="O", size=20_000, random_state=0).reshape(-1, 9)
        np.testing.assert_allclose(R.mean(axis=0), 0, atol=0.02)
        np.testing.assert_allclose(R.T @ R / len(R), np.eye(9) / 3, atol=0.02)

    def test_rank_one_scales_by_up_to_the_condition(self):
        sizes = np.abs(random_gauge(1, condition=100, size=1000, random_state=0)).ravel()
        assert 0.1 < sizes.min() < 0.12
        assert 8 < sizes.max() < 10

    def test_shapes_and_dtype(self):
        assert random_gauge(2).shape == (2, 2)
        assert random_gauge(2, size=3).shape == (3, 2, 2)
        assert random_gauge(2, size=np.int64(3)).shape == (3, 2, 2)
        assert random_gauge(2, size=(3, 4), dtype=np.float32).shape == (3, 4, 2, 2)
        assert random_gauge(2, dtype=np.float32).dtype == np.float32

    def test_random_state(self):
        first, second = (random_gauge(3, random_state=4) for _ in range(2))
        np.testing.assert_array_equal(first, second)
        assert not np.array_equal(first, random_gauge(3, random_state=5))

    @pytest.mark.parametrize(
        "arguments",
        [
            {"rank": 0},
            {"rank": 2, "condition": 0.5},
            {"rank": 2, "condition": np.nan},
            {"rank": 2, "condition": np.inf},
        ],
    )
    def test_bad_numbers(self, arguments):
        with pytest.raises(ValueError, match="of at least 1, which is finite, got rank="):
            random_gauge(**arguments)

    def test_unknown_group(self):
        with pytest.raises(ValueError, match="group='SO' is unknown; pass 'GL' or 'O'"):
            random_gauge(2, group="SO")


class TestApplyGauge:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)])
    @pytest.mark.parametrize("group", ["GL", "O"])
    def test_updates_stay(self, random_loras, rng, dtype, tolerance, group):
        X = random_loras(rng, dtype=dtype, ids=list("abcdefgh"), base_model="b")
        moved = apply_gauge(X, group, 10, random_state=0)
        assert (moved.dtype, moved.layout) == (X.dtype, X.layout)
        np.testing.assert_array_equal(moved.ids, X.ids)
        np.testing.assert_allclose(updates(moved), updates(X), atol=20 * tolerance)
        assert np.abs(moved.read() - X.read()).max() > 0.1

    def test_single_precision_is_rounded_at_the_end(self, random_loras, rng):
        X = random_loras(rng, dtype=np.float32)
        double = LoRACollection.from_array(X.read().astype(np.float64), X.layout)
        found, expected = (apply_gauge(A, random_state=0).read() for A in (X, double))
        np.testing.assert_array_equal(found, expected.astype(np.float32))

    def test_padding_stays_zero(self, random_loras, rng):
        ranks = rng.integers(0, 4, size=(8, 3))
        X = random_loras(rng, rank=ranks)
        moved = apply_gauge(X, random_state=0)
        np.testing.assert_array_equal(moved.ranks, ranks)
        np.testing.assert_array_equal(X.layout.infer_ranks(moved.read()), ranks)
        np.testing.assert_allclose(updates(moved), updates(X), atol=1e-10)
        zeros = LoRACollection.from_array(np.zeros(X.shape), X.layout, ranks=ranks)
        np.testing.assert_array_equal(apply_gauge(zeros).ranks, ranks)

    def test_side_features_stay(self, random_loras, rng):
        side = [{"s": [float(i)]} for i in range(8)]
        X = random_loras(rng, side=side)
        np.testing.assert_array_equal(apply_gauge(X)[:, -1], np.arange(8.0))

    def test_every_update_has_its_own_gauge(self):
        eye = np.eye(3)
        X = LoRACollection.from_factors([{"q": (eye, eye), "v": (eye, eye)}] * 2)
        gauges = apply_gauge(X, random_state=0).factors()[0][0].reshape(4, 3, 3)
        for i in range(4):
            for j in range(i):
                assert np.abs(gauges[i] - gauges[j]).max() > 0.1

    def test_what_has_no_gauge(self):
        with pytest.raises(TypeError, match=r"type ndarray, .* LoRACollection\.from_array"):
            apply_gauge(np.ones((2, 3)))
        with pytest.raises(ValueError, match="plain rows"):
            apply_gauge(LoRACollection.from_array(np.ones((2, 3)), LoRALayout.rows(3)))


class TestInvariance:
    @pytest.mark.parametrize(("dtype", "condition"), [(np.float64, 1e4), (np.float32, 1e2)])
    def test_updates_are_invariant(self, random_loras, rng, dtype, condition):
        X = random_loras(rng, dtype=dtype, rank=[[1, 2, 0]] * 4 + [[2, 2, 1]] * 4)
        assert_gauge_invariant(FunctionTransformer(updates), X, condition=condition, random_state=0)

    def test_grams_are_invariant_to_rotations_only(self, random_loras, rng):
        X = random_loras(rng)
        assert_gauge_invariant(FunctionTransformer(grams), X, group="O", random_state=0)
        with pytest.raises(AssertionError, match=r"not invariant to GL\(r\)"):
            assert_gauge_invariant(FunctionTransformer(grams), X, random_state=0)
        assert_gauge_invariant(FunctionTransformer(grams), X, condition=1, random_state=0)

    def test_volumes_are_invariant_to_gauges_of_determinant_one_only(self, random_loras, rng):
        def volumes(X):
            return np.hstack([np.linalg.slogdet(U.mT @ U).logabsdet for U, _ in X.factors()])

        X = random_loras(rng)
        assert_gauge_invariant(FunctionTransformer(volumes), X, group="O", random_state=0)
        with pytest.raises(AssertionError, match=r"not invariant to GL\(r\)"):
            assert_gauge_invariant(FunctionTransformer(volumes), X, random_state=0)

    @pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-6), (np.float32, 1e-3)])
    @pytest.mark.parametrize("group", ["GL", "O"])
    def test_factors_are_not_invariant(self, random_loras, rng, group, dtype, rtol):
        message = (
            r"FunctionTransformer\.transform is not invariant to \w+\(r\): the output for adapter "
            rf"'[a-h]' is off by \S+, where at most \S+ is tolerated \({rtol=}, atol=0\.0\)"
        )
        with pytest.raises(AssertionError, match=message):
            assert_gauge_invariant(
                FunctionTransformer(factors),
                random_loras(rng, dtype=dtype, ids=list("abcdefgh")),
                group=group,
                random_state=0,
            )

    def test_one_seed_names_one_adapter_the_worst(self, random_loras, rng):
        def off(X):
            return updates(X) + np.array([1, 1, 1, 1, 1, 1, 1e3, 1])[:, None] * factors(X)[:, :1]

        X = random_loras(rng, ids=list("abcdefgh"))
        messages = set()
        for _ in range(2):
            with pytest.raises(AssertionError, match="for adapter 'g' is off by") as error:
                assert_gauge_invariant(FunctionTransformer(off), X, random_state=3)
            messages.add(str(error.value))
        assert len(messages) == 1

    def test_one_of_many_labels_is_a_deviation(self, random_loras, rng):
        def labels(X):
            return np.column_stack([updates(X)[:, 0] > 0, factors(X)[:, 0] > 0])

        with pytest.raises(AssertionError, match=r"off by 0\.5, where at most 0 is"):
            assert_gauge_invariant(FunctionTransformer(labels), random_loras(rng), random_state=0)

    def test_sparse_output(self, random_loras, rng):
        X = random_loras(rng)
        model = FunctionTransformer(lambda X: csr_array(updates(X)))
        assert_gauge_invariant(model, X, random_state=0)

    def test_collections_are_compared_as_they_are(self, random_loras, rng):
        with pytest.raises(AssertionError, match="not invariant"):
            assert_gauge_invariant(FunctionTransformer(), random_loras(rng), random_state=0)

    def test_tolerance(self, random_loras, rng):
        def off(X):
            return updates(X) + 1e-4 * np.tanh(factors(X)[:, :1])

        X = random_loras(rng)
        with pytest.raises(AssertionError):
            assert_gauge_invariant(FunctionTransformer(off), X, random_state=0)
        assert_gauge_invariant(FunctionTransformer(off), X, rtol=1e-3, random_state=0)
        assert_gauge_invariant(FunctionTransformer(off), X, atol=1e-3, random_state=0)

    def test_nan_is_a_deviation(self, random_loras, rng):
        def broken(X):
            return np.where(factors(X) == first, 1.0, np.nan)

        X = random_loras(rng)
        first = factors(X)
        with pytest.raises(AssertionError, match="off by nan"):
            assert_gauge_invariant(FunctionTransformer(broken), X, random_state=0)

    def test_infinity_that_comes_or_goes_is_a_deviation(self, random_loras, rng):
        def broken(X, before, after):
            return np.where(factors(X)[:, :2] == first, before, after)

        X = random_loras(rng)
        first = factors(X)[:, :2]
        for before, after in ((np.inf, 1.0), (1.0, np.inf), (np.inf, -np.inf)):
            model = FunctionTransformer(broken, kw_args={"before": before, "after": after})
            with pytest.raises(AssertionError, match="off by inf, where at most"):
                assert_gauge_invariant(model, X, random_state=0)

    def test_infinity_that_stays_is_no_deviation(self, random_loras, rng):
        X = random_loras(rng)
        model = FunctionTransformer(lambda X: np.where(updates(X) > 0, updates(X), -np.inf))
        assert_gauge_invariant(model, X, random_state=0)

    def test_large_columns_that_stay_hide_nothing(self, random_loras, rng):
        X = random_loras(rng, side=[{"steps": 1e12}] * 8)
        assert_gauge_invariant(SVDSpectrum(), X, random_state=0)
        with pytest.raises(AssertionError, match=r"not invariant to GL\(r\)"):
            assert_gauge_invariant(FunctionTransformer(factors), X, random_state=0)

    def test_large_columns_that_move_by_rounding_hide_little(self, random_loras, rng):
        def mixed(X):
            lengths = np.log([np.linalg.norm(U) for U in X.factors()[0][0]])
            return np.column_stack([1e3 * updates(X), lengths])

        X = random_loras(rng, dtype=np.float32)
        with pytest.raises(AssertionError, match=r"not invariant to GL\(r\)"):
            assert_gauge_invariant(FunctionTransformer(mixed), X, random_state=0)

    def test_the_column_that_is_furthest_beyond_its_tolerance_is_told(self, random_loras, rng):
        def mixed(X):
            off = [9e-5, 5e-5] if (factors(X) != first).any() else [0, 0]
            return np.add([100.0, 1.0], off) * np.ones((len(X), 1))

        X = random_loras(rng)
        first = factors(X)
        with pytest.raises(AssertionError, match="off by 5e-05, where at most 1e-05 is tolerated"):
            assert_gauge_invariant(FunctionTransformer(mixed), X, random_state=0)

    @pytest.mark.parametrize("seed", range(5))
    def test_directions_that_hardly_vary_are_no_deviation(self, seed):
        """Adapters with one start differ by little, and the last components by less."""
        rng = np.random.default_rng(seed)
        start = [(rng.normal(size=(20, 4)), rng.normal(size=(16, 4))) for _ in range(2)]
        X = LoRACollection.from_factors(
            {
                f"m{place}": tuple(
                    (factor + 0.01 * rng.normal(size=factor.shape)).astype(np.float32)
                    for factor in pair
                )
                for place, pair in enumerate(start)
            }
            for _ in range(40)
        )
        model = make_pipeline(DenseProduct("gram"), StandardScaler(), PCA())
        assert_gauge_invariant(model, X, random_state=seed)

    def test_columns_of_rounding_are_no_deviation(self, random_loras, rng):
        def mixed(X):
            return np.column_stack([updates(X), 1e-7 * np.tanh(factors(X)[:, :1])])

        X = random_loras(rng, dtype=np.float32)
        assert_gauge_invariant(FunctionTransformer(mixed), X, random_state=0)

    def test_pipelines_that_end_in_what_needs_no_fit(self, random_loras, rng):
        model = make_pipeline(SVDSpectrum(), Normalizer())
        assert_gauge_invariant(model, random_loras(rng), random_state=0)
        assert not hasattr(model[0], "layout_")

    def test_fitted_pipelines_of_what_has_no_attributes_stay(self, random_loras, rng):
        class Updates(TransformerMixin, BaseEstimator):
            def fit(self, X, y):
                return self

            def transform(self, X):
                return updates(X)

        X = random_loras(rng)
        model = make_pipeline(Updates(), Normalizer()).fit(X, np.arange(8))
        assert_gauge_invariant(model, X, random_state=0)

    def test_classifiers(self, random_loras, rng):
        X, y = random_loras(rng), np.array(["cat", "dog"] * 4)
        invariant = make_pipeline(FunctionTransformer(updates), LogisticRegression())
        for method in (None, "predict_proba", "decision_function", "predict"):
            assert_gauge_invariant(invariant, X, y, method=method, random_state=0)
        dependent = make_pipeline(FunctionTransformer(factors), LogisticRegression())
        for method in (None, "decision_function", "predict"):
            with pytest.raises(AssertionError, match=f"Pipeline.{method or 'predict_proba'} is"):
                assert_gauge_invariant(dependent, X, y, method=method, random_state=0)

    def test_regressors_that_are_fitted_stay_as_they_are(self, random_loras, rng):
        X, y = random_loras(rng), np.arange(8.0)
        model = make_pipeline(FunctionTransformer(updates), LinearRegression()).fit(X, y)
        coefficients = model[-1].coef_.copy()
        assert_gauge_invariant(model, X, random_state=0)
        np.testing.assert_array_equal(model[-1].coef_, coefficients)

    def test_what_is_not_fitted_stays_so(self, random_loras, rng):
        model = make_pipeline(FunctionTransformer(updates), LinearRegression())
        assert_gauge_invariant(model, random_loras(rng), np.arange(8.0), random_state=0)
        assert not hasattr(model[-1], "coef_")

    def test_what_does_not_check_whether_it_is_fitted(self, random_loras, rng):
        class Scaled(TransformerMixin, BaseEstimator):
            def fit(self, X, y=None):
                self.scale_ = 2.0
                return self

            def transform(self, X):
                return self.scale_ * updates(X)

        assert_gauge_invariant(Scaled(), random_loras(rng), random_state=0)

    def test_lists_of_probabilities(self, random_loras, rng):
        class ManyTargets(BaseEstimator):
            def __init__(self, of=updates):
                self.of = of

            def fit(self, X, y=None):
                return self

            def predict_proba(self, X):
                return [self.of(X), self.of(X)[:, :2]]

        assert_gauge_invariant(ManyTargets(), random_loras(rng), random_state=0)
        with pytest.raises(AssertionError):
            assert_gauge_invariant(ManyTargets(factors), random_loras(rng), random_state=0)

    def test_shapes_have_to_agree(self, random_loras, rng):
        def positive(X):
            return updates(X)[:, : 1 + (factors(X)[0, 0] == first)]

        X = random_loras(rng)
        first = factors(X)[0, 0]
        with pytest.raises(AssertionError, match=r"has shape \(8, 2\) or \(8, 1\)"):
            assert_gauge_invariant(FunctionTransformer(positive), X, random_state=0)

    def test_nothing_to_compare(self, random_loras, rng):
        with pytest.raises(AssertionError, match="no output to compare"):
            assert_gauge_invariant(FunctionTransformer(factors), random_loras(rng)[:0])

    def test_no_method(self, random_loras, rng):
        with pytest.raises(TypeError, match="FunctionTransformer has no predict"):
            assert_gauge_invariant(FunctionTransformer(), random_loras(rng), method="predict")
        with pytest.raises(TypeError, match="has none of predict_proba, decision_function"):
            assert_gauge_invariant(NoMethod(), random_loras(rng))


class NoMethod(BaseEstimator):
    def fit(self, X, y=None):
        return self


class Map(TransformerMixin, BaseEstimator):
    """Apply a function to U of every adapter."""

    def __init__(self, function):
        self.function = function

    def fit(self, X, y=None):
        return self

    def transform(self, X):
        moved = [{name: (self.function(U), V) for name, (U, V) in lora.items()} for lora in X]
        return LoRACollection.from_factors(moved)


class TestEquivariance:
    @pytest.mark.parametrize("group", ["GL", "O"])
    def test_maps_of_the_output_side_are_equivariant(self, random_loras, rng, group):
        X = random_loras(rng, rank=[[1, 2, 3]] * 4 + [[3, 1, 1]] * 4)
        assert_gauge_equivariant(Map(lambda U: U[1:] + 2 * U[:-1]), X, group=group, random_state=0)

    @pytest.mark.parametrize("function", [np.tanh, lambda U: U + 1, lambda U: U[:, ::-1]])
    def test_maps_of_single_numbers_are_not(self, random_loras, rng, function):
        with pytest.raises(AssertionError, match=r"Map\.transform is not equivariant to O\(r\)"):
            assert_gauge_equivariant(Map(function), random_loras(rng), group="O", random_state=0)

    def test_scaling_is_equivariant_to_within_tolerance(self, random_loras, rng):
        X = random_loras(rng)
        nearly = Map(lambda U: U + 1e-4)
        with pytest.raises(AssertionError):
            assert_gauge_equivariant(nearly, X, random_state=0)
        assert_gauge_equivariant(nearly, X, rtol=1e-2, random_state=0)
        assert_gauge_equivariant(nearly, X, atol=1e-2, random_state=0)

    def test_lengths_are_those_of_gauges_of_condition_one(self, random_loras, rng):
        X, lengths = random_loras(rng), Map(lambda U: U * np.linalg.norm(U))
        assert_gauge_equivariant(lengths, X, condition=1, random_state=0)
        with pytest.raises(AssertionError, match=r"not equivariant to GL\(r\)"):
            assert_gauge_equivariant(lengths, X, random_state=0)

    def test_other_ranks(self, random_loras, rng):
        padded = FunctionTransformer(
            lambda X: LoRACollection.from_array(X.read(), X.layout, ranks=X.ranks - 1)
        )
        with pytest.raises(AssertionError, match="the ranks of its output are not those"):
            assert_gauge_equivariant(padded, random_loras(rng))

    def test_what_gives_no_collection(self, random_loras, rng):
        with pytest.raises(AssertionError, match="its output is of type ndarray"):
            assert_gauge_equivariant(FunctionTransformer(updates), random_loras(rng))
