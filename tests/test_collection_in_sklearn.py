"""Collections pass through scikit-learn's machinery without being turned into arrays."""

import warnings

import numpy as np
import pytest
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.ensemble import (
    BaggingClassifier,
    StackingClassifier,
    StackingRegressor,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.experimental import enable_halving_search_cv  # noqa: F401  (adds HalvingGridSearchCV)
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    HalvingGridSearchCV,
    LeaveOneGroupOut,
    RandomizedSearchCV,
    ShuffleSplit,
    TimeSeriesSplit,
    cross_val_predict,
    cross_val_score,
    learning_curve,
    permutation_test_score,
    train_test_split,
    validation_curve,
)
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import gen_batches, resample, shuffle

from sklora.collection import LoRACollection, check_loras

N = 40


class Norms(TransformerMixin, BaseEstimator):
    """Norms of the updates, of collections alone unless it has a layout."""

    def __init__(self, power=1.0, layout=None):
        self.power = power
        self.layout = layout

    def fit(self, X, y=None):
        self._check_loras(X, reset=True)
        return self

    def transform(self, X):
        loras = self._check_loras(X, reset=False)
        products = [U @ V.swapaxes(-1, -2) for U, V in loras.factors()]
        return np.hstack([np.linalg.norm(p, axis=(2, 3)) for p in products]) ** self.power

    def _check_loras(self, X, *, reset):
        if self.layout is None:
            assert isinstance(X, LoRACollection)
        return check_loras(self, X, reset=reset)


@pytest.fixture(params=["array", "map"])
def X(request, random_loras, rng, tmp_path):
    loras = random_loras(rng, N, dtype=np.float32)
    if request.param == "array":
        return loras
    path = tmp_path / "loras.npy"
    np.save(path, np.asarray(loras))
    return LoRACollection.from_array(np.load(path, mmap_mode="r"), loras.layout)


@pytest.fixture
def size(X):
    return Norms().fit_transform(X).sum(axis=1, dtype=np.float64)


@pytest.fixture
def y(size):
    return np.where(size > np.median(size), "large", "small")


def classifier():
    return make_pipeline(Norms(), StandardScaler(), LogisticRegression())


def regressor():
    return make_pipeline(Norms(), LinearRegression())


GRID = {"norms__power": [0.5, 1.0]}


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_cross_val_score(X, y, n_jobs):
    scores = cross_val_score(classifier(), X, y, n_jobs=n_jobs, error_score="raise")
    assert scores.mean() > 0.8


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_grid_search(X, y, n_jobs):
    search = GridSearchCV(classifier(), GRID, n_jobs=n_jobs, error_score="raise").fit(X, y)
    assert search.score(X, y) > 0.9
    assert search.n_features_in_ == X.layout.width


def test_randomized_search(X, y):
    search = RandomizedSearchCV(classifier(), GRID, n_iter=2, random_state=0, error_score="raise")
    assert search.fit(X, y).score(X, y) > 0.9


def test_halving_grid_search(X, y):
    search = HalvingGridSearchCV(classifier(), GRID, cv=2, random_state=0, error_score="raise")
    assert search.fit(X, y).score(X, y) > 0.9


def test_nested_search_on_a_view(X, y):
    search = GridSearchCV(classifier(), GRID, cv=2, error_score="raise")
    assert cross_val_score(search, X[::-1], y[::-1], cv=2, error_score="raise").mean() > 0.8


def test_train_test_split(X, y):
    X_train, X_test, y_train, _, _, rows = train_test_split(
        X, y, np.arange(N), stratify=y, test_size=10, random_state=0
    )
    assert (X_train.shape, X_test.shape) == ((30, X.shape[1]), (10, X.shape[1]))
    assert sorted(y_train) == ["large"] * 15 + ["small"] * 15
    np.testing.assert_array_equal(X_test.ids, rows)
    assert X_train._store is X._store


@pytest.mark.parametrize("method", ["predict", "predict_proba", "decision_function"])
def test_cross_val_predict(X, y, method):
    assert len(cross_val_predict(classifier(), X, y, method=method)) == N


def test_learning_and_validation_curve(X, y):
    _, _, scores = learning_curve(
        classifier(),
        X,
        y,
        train_sizes=[0.5, 1.0],
        shuffle=True,
        random_state=0,
        error_score="raise",
    )
    assert scores.shape == (2, 5)
    _, scores = validation_curve(
        classifier(), X, y, param_name="norms__power", param_range=[0.5, 1], error_score="raise"
    )
    assert scores.shape == (2, 5)


def test_permutation_test_score(X, y):
    score, permuted, _ = permutation_test_score(
        classifier(), X, y, n_permutations=5, random_state=0
    )
    assert score > permuted.max()


@pytest.mark.parametrize(
    "cv", [GroupKFold(4), LeaveOneGroupOut(), ShuffleSplit(2), TimeSeriesSplit(2)]
)
def test_splitters(X, size, cv):
    groups = np.arange(N) % 4 if "Group" in type(cv).__name__ else None
    scores = cross_val_score(regressor(), X, size, groups=groups, cv=cv, error_score="raise")
    np.testing.assert_allclose(scores, 1)


@pytest.mark.parametrize("ensemble", [VotingClassifier, StackingClassifier])
def test_ensembles_of_classifiers(X, y, ensemble):
    model = ensemble([("a", classifier()), ("b", classifier().set_params(norms__power=0.5))])
    assert model.fit(X, y).score(X, y) > 0.9


@pytest.mark.parametrize("ensemble", [VotingRegressor, StackingRegressor])
def test_ensembles_of_regressors(X, size, ensemble):
    model = ensemble([("a", regressor()), ("b", regressor().set_params(norms__power=0.5))])
    assert model.fit(X, size).score(X, size) > 0.9


def test_bagging_turns_collections_into_arrays_so_it_needs_the_layout(X, y):
    base = classifier().set_params(norms__layout=X.layout)
    model = BaggingClassifier(base, n_estimators=3, random_state=0).fit(X, y)
    assert model.score(X, y) > 0.8


@pytest.mark.parametrize("ensemble", [True, False])
def test_calibration(X, y, ensemble):
    model = CalibratedClassifierCV(classifier(), cv=2, ensemble=ensemble).fit(X, y)
    assert model.predict_proba(X).shape == (N, 2)


def test_transformed_targets(X, size):
    model = TransformedTargetRegressor(regressor(), func=np.log, inverse_func=np.exp)
    assert model.fit(X, size).score(X, size) > 0.9


def test_many_targets(X, y):
    targets = np.column_stack([y, y[::-1]])
    model = MultiOutputClassifier(classifier()).fit(X, targets)
    assert model.predict(X).shape == (N, 2)


def test_pipelines_that_cache(X, y, tmp_path):
    model = Pipeline(classifier().steps, memory=str(tmp_path / "cache"))
    first = model.fit(X, y).predict_proba(X)
    np.testing.assert_array_equal(clone(model).fit(X[:], y).predict_proba(X), first)
    # Other rows are not mistaken for those in the cache.
    other = model.fit(X[::2], y[::2])[0]
    np.testing.assert_array_equal(other.transform(X[:2]), Norms().fit(X).transform(X[:2]))
    assert len(list((tmp_path / "cache").rglob("output.pkl"))) == 2 * len(model.steps) - 2


def test_feature_union(X, y):
    union = FeatureUnion([("a", Norms()), ("b", Norms(power=2.0))])
    assert union.fit_transform(X).shape == (N, 6)
    assert make_pipeline(union, StandardScaler(), LogisticRegression()).fit(X, y).score(X, y) > 0.9


@pytest.mark.parametrize("columns", [[0, 3], slice(2, 5), np.arange(58) < 4])
def test_column_transformer_sees_the_flat_array(X, columns):
    model = ColumnTransformer([("scaled", StandardScaler(), columns)], remainder="passthrough")
    found, expected = model.fit_transform(X), model.fit_transform(np.asarray(X))
    np.testing.assert_array_equal(found, expected)


def test_any_step_takes_the_flat_array(X):
    found, expected = StandardScaler().fit(X), StandardScaler().fit(np.asarray(X))
    np.testing.assert_array_equal(found.transform(X), expected.transform(np.asarray(X)))


def test_clone_keeps_the_layout(X):
    twin = clone(Norms(layout=X.layout))
    assert twin.layout == X.layout
    assert "layout=LoRALayout(n_modules=3, width=58)" in repr(twin)


def test_utilities(X):
    assert resample(X, n_samples=5, random_state=0).shape == (5, X.shape[1])
    assert sorted(shuffle(X, random_state=0).ids) == sorted(X.ids)
    batches = [X[batch].read() for batch in gen_batches(N, 7)]
    np.testing.assert_array_equal(np.concatenate(batches), np.asarray(X))


def test_no_warnings_from_the_machinery(X, y):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier().fit(X, y).predict(X)
