"""Featurizers and networks in scikit-learn's machinery, on collections in memory and mapped."""

from __future__ import annotations

import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.ensemble import BaggingClassifier, StackingClassifier, VotingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401  (adds HalvingGridSearchCV)
from sklearn.frozen import FrozenEstimator
from sklearn.inspection import permutation_importance
from sklearn.metrics import accuracy_score, make_scorer
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    GroupKFold,
    HalvingGridSearchCV,
    TunedThresholdClassifierCV,
    cross_val_predict,
    cross_val_score,
    cross_validate,
    learning_curve,
    permutation_test_score,
    train_test_split,
)
from sklearn.multioutput import ClassifierChain, MultiOutputClassifier, MultiOutputRegressor
from sklearn.pipeline import Pipeline, make_pipeline, make_union
from sklearn.semi_supervised import SelfTrainingClassifier
from sklearn.utils.metadata_routing import get_routing_for_object

from sklora import (
    DenseProduct,
    GLNetClassifier,
    GLNetRegressor,
    LoRACollection,
    MLPNetClassifier,
    MLPNetRegressor,
    OAlign,
    SVDSpectrum,
)

QUICK = {"hidden_dim": 4, "max_epochs": 2, "random_state": 0, "device": "cpu"}
# What a net needs to learn the labels of `rows`.
LEARNS = {"hidden_dim": 8, "max_epochs": 30, "lr": 0.02, "dropout": 0.0, "early_stopping": False}


@pytest.fixture(params=["array", "memmap"])
def X(request, rng, random_loras, tmp_path):
    loras = random_loras(rng, n_adapters=48, shapes=((6, 4), (5, 4)), rank=2)
    if request.param == "array":
        return loras
    np.save(tmp_path / "zoo.npy", np.asarray(loras))
    return LoRACollection.from_array(np.load(tmp_path / "zoo.npy", mmap_mode="r"), loras.layout)


@pytest.fixture
def y():
    return np.arange(48) % 2


def gl_net(**parameters):
    return GLNetClassifier(**QUICK | parameters)


def svd(**parameters):
    return make_pipeline(SVDSpectrum(), MLPNetClassifier(**QUICK | parameters))


def o_align():
    return make_pipeline(OAlign(random_state=0), MLPNetClassifier(**QUICK))


@pytest.fixture(params=[gl_net, svd, o_align])
def model(request):
    return request.param()


def test_cross_validation_in_workers_equals_serial(model, X, y):
    serial = cross_val_score(model, X, y, cv=3)
    np.testing.assert_array_equal(cross_val_score(model, X, y, cv=3, n_jobs=2), serial)
    assert np.isfinite(serial).all()


def test_groups(model, X, y):
    assert len(cross_val_score(model, X, y, groups=np.arange(48) // 4, cv=GroupKFold(3))) == 3


def test_cross_val_predict(model, X, y):
    probabilities = cross_val_predict(model, X, y, cv=3, method="predict_proba")
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_grid_search_in_workers(X, y):
    search = GridSearchCV(gl_net(), {"head": ["flatten", "mean"]}, cv=2, n_jobs=2).fit(X, y)
    assert search.best_estimator_.layout_ == X.layout


def test_stratified_split(model, X, y):
    X_train, X_test, y_train, y_test = train_test_split(X, y, stratify=y, random_state=0)
    assert y_test.sum() == 6
    assert 0 <= model.fit(X_train, y_train).score(X_test, y_test) <= 1


def test_curves_and_permutations(X, y):
    _, train_scores, _ = learning_curve(svd(), X, y, cv=2, train_sizes=[0.5, 1.0])
    assert train_scores.shape == (2, 2)
    _, permuted, p = permutation_test_score(svd(), X, y, cv=2, n_permutations=3, random_state=0)
    assert len(permuted) == 3
    assert 0 < p <= 1


@pytest.mark.parametrize("ensemble", [StackingClassifier, VotingClassifier])
def test_ensembles(ensemble, X, y):
    options = {"cv": 2} if ensemble is StackingClassifier else {"voting": "soft"}
    members = [("gl", gl_net()), ("svd", svd()), ("aligned", o_align())]
    assert ensemble(members, **options).fit(X, y).predict_proba(X).shape == (48, 2)


def test_bagging_takes_the_layout(X, y):
    bag = BaggingClassifier(gl_net(layout=X.layout), n_estimators=2, random_state=0).fit(X, y)
    assert all(member.layout_ == X.layout for member in bag.estimators_)
    assert bag.predict(X).shape == y.shape


def test_calibration(model, X, y):
    calibrated = CalibratedClassifierCV(model, cv=2).fit(X, y)
    np.testing.assert_allclose(calibrated.predict_proba(X).sum(axis=1), 1)


def test_transformed_targets(X):
    target = np.exp(np.linspace(0, 3, 48))
    model = TransformedTargetRegressor(GLNetRegressor(**QUICK), func=np.log, inverse_func=np.exp)
    assert (model.fit(X, target).predict(X) > 0).all()


def test_unions_of_featurizers(X, y):
    union = make_union(SVDSpectrum(), DenseProduct())
    assert union.fit_transform(X).shape == (48, 2 * 2 + 6 * 4 + 5 * 4)
    assert make_pipeline(union, MLPNetClassifier(**QUICK)).fit(X, y).predict(X).shape == y.shape


def test_column_transformer_on_the_flat_view(X):
    layout = X.layout
    columns = np.arange(layout.width)
    transformer = ColumnTransformer([("svd", SVDSpectrum(layout=layout), columns)])
    np.testing.assert_allclose(
        transformer.fit_transform(np.asarray(X)), SVDSpectrum().fit_transform(X)
    )


def test_pipelines_that_cache(X, y, tmp_path):
    cached = svd().set_params(memory=str(tmp_path / "cache"))
    expected = svd().fit(X, y).predict_proba(X)
    for _ in range(2):
        np.testing.assert_array_equal(cached.fit(X, y).predict_proba(X), expected)


@pytest.fixture
def rows(rng):
    """Adapters of which one module gives the label away, and the labels."""
    labels = np.arange(60) % 2
    adapters = (
        {
            "signal": (rng.normal(size=(6, 2)) + 3 * label, rng.normal(size=(4, 2)) + 3 * label),
            "noise": (rng.normal(size=(5, 2)), rng.normal(size=(4, 2))),
        }
        for label in labels
    )
    return LoRACollection.from_factors(adapters), labels


@pytest.fixture
def weights():
    """Half of the adapters, of either label."""
    return np.where(np.arange(60) % 4 < 2, 1.0, 0.0)


@pytest.fixture
def flipped(rows, weights):
    """Labels that are wrong where the weight is zero, so that only weighted models learn them."""
    _, y = rows
    return np.where(weights > 0, y, 1 - y)


def learner(**parameters):
    """A pipeline that learns those labels."""
    return make_pipeline(SVDSpectrum(), MLPNetClassifier(**QUICK | LEARNS | parameters))


def test_cross_validate_returns_all(model, X, y):
    result = cross_validate(model, X, y, cv=3, return_estimator=True, return_indices=True)
    for estimator, test, score in zip(
        result["estimator"], result["indices"]["test"], result["test_score"], strict=True
    ):
        assert estimator.score(X[test], y[test]) == score


@pytest.mark.parametrize(
    ("make", "metrics"),
    [
        (lambda y: y, ["accuracy", "roc_auc", "f1", "neg_log_loss", "neg_brier_score"]),
        (lambda y: np.arange(48) % 3, ["roc_auc_ovr", "neg_log_loss", "f1_macro"]),
        (lambda y: np.column_stack([y, 1 - y]), ["accuracy", "f1_micro", "roc_auc"]),
    ],
    ids=["binary", "multiclass", "multilabel"],
)
def test_many_metrics_at_once(make, metrics, X, y):
    result = cross_validate(svd(), X, make(y), cv=2, scoring=metrics, error_score="raise")
    for metric in metrics:
        assert np.isfinite(result[f"test_{metric}"]).all()


@pytest.mark.parametrize(
    "dress",
    [
        list,
        pd.Series,
        pl.Series,
        lambda y: pd.Series(y, dtype="Int64"),
        lambda y: pd.Series(y == 1, dtype="boolean"),
        lambda y: pd.Series(np.array(["a", "b"])[y], dtype="string"),
        lambda y: pd.Series(np.array(["a", "b"])[y], dtype="category"),
        lambda y: y.astype(np.float32),
    ],
    ids=["list", "pandas", "polars", "Int64", "boolean", "string", "category", "float32"],
)
def test_classes_come_as_anything(dress, X, y):
    model, expected = gl_net().fit(X, dress(y)), gl_net().fit(X, y)
    np.testing.assert_array_equal(model.predict_proba(X), expected.predict_proba(X))
    np.testing.assert_array_equal(model.predict(X) == model.classes_[1], expected.predict(X))


@pytest.mark.parametrize("dtype", ["Float64", "float32", "Int64"])
def test_numbers_come_as_pandas_has_them(dtype, X):
    y = pd.Series(np.arange(48), dtype=dtype)
    net = GLNetRegressor(**QUICK)
    predicted = net.fit(X, y).predict(X)
    np.testing.assert_array_equal(predicted, net.fit(X, np.arange(48.0)).predict(X))


@pytest.mark.parametrize("frame", ["pandas", "polars"])
@pytest.mark.parametrize("features", [OAlign(random_state=0), SVDSpectrum()], ids=repr)
def test_data_frames_for_all_leave_models_as_they_are(features, frame, X, y):
    model = make_pipeline(features, MLPNetClassifier(**QUICK))
    expected = model.fit(X, y).predict_proba(X)
    with sklearn.config_context(transform_output=frame):
        np.testing.assert_array_equal(model.fit(X, y).predict_proba(X), expected)


def test_halving_search(X, y):
    search = HalvingGridSearchCV(gl_net(), {"head": ["flatten", "mean"]}, cv=2, random_state=0)
    assert search.fit(X, y).best_estimator_.layout_ == X.layout


class TestThresholds:
    def test_tuned(self, rows):
        X, y = rows
        tuned = TunedThresholdClassifierCV(learner(), scoring="balanced_accuracy", cv=2)
        assert tuned.fit(X, y).score(X, y) > 0.9
        assert 0 < tuned.best_threshold_ < 1

    def test_tuned_on_a_fitted_model(self, rows):
        X, y = rows
        fitted = learner().fit(X, y)
        tuned = TunedThresholdClassifierCV(fitted, cv="prefit", refit=False).fit(X, y)
        assert tuned.estimator_ is fitted

    @pytest.mark.parametrize("method", ["predict_proba", "decision_function"])
    def test_fixed(self, method, rows):
        X, y = rows
        model = FixedThresholdClassifier(learner(), threshold=0.75, response_method=method)
        model.fit(X, y)
        values = getattr(model.estimator_, method)(X)
        odds = values[:, 1] if values.ndim == 2 else values
        np.testing.assert_array_equal(model.predict(X), (odds >= 0.75).astype(int))


class TestCalibration:
    @pytest.mark.parametrize("method", ["sigmoid", "isotonic"])
    def test_of_a_frozen_model(self, method, rows):
        X, y = rows
        fitted = learner().fit(X[:30], y[:30])
        before = fitted.predict_proba(X)
        calibrated = CalibratedClassifierCV(FrozenEstimator(fitted), method=method)
        calibrated.fit(X[30:], y[30:])
        np.testing.assert_array_equal(fitted.predict_proba(X), before)
        assert calibrated.score(X, y) > 0.9

    def test_weights_arrive(self, rows, weights, flipped):
        X, y = rows
        model = CalibratedClassifierCV(gl_net(**LEARNS), cv=2, ensemble=False)
        assert model.fit(X, flipped, sample_weight=weights).score(X, y) > 0.9


# One column of many changes probabilities rather than labels.
SUBTLE = {"scoring": "neg_log_loss", "n_repeats": 1, "random_state": 0}


class TestPermutationImportance:
    def test_of_a_flat_array(self, rows):
        X, y = rows
        model = learner().fit(X, y)
        found = permutation_importance(model, np.asarray(X), y, **SUBTLE).importances_mean
        assert found.shape == (X.shape[1],)
        of_modules = [found[U.start : V.stop].mean() for U, V in X.layout.factor_slices]
        assert of_modules[X.layout.names.index("signal")] == max(of_modules) > 0

    def test_makes_a_flat_array_of_a_collection(self, rows):
        """The layout is that of the fit, so that the columns are those of the flat array."""
        X, y = rows
        model = learner().fit(X, y)
        found, expected = (
            permutation_importance(model, given, y, **SUBTLE).importances
            for given in (X, np.asarray(X))
        )
        np.testing.assert_array_equal(found, expected)

    def test_of_a_data_frame(self, rows):
        X, y = rows
        flat = pd.DataFrame(np.asarray(X), columns=X.layout.feature_names())
        model = learner()
        model.set_params(svdspectrum__layout=X.layout).fit(flat, y)
        result = permutation_importance(model, flat, y, **SUBTLE)
        best = model[0].feature_names_in_[result.importances_mean.argmax()]
        assert best.startswith("signal:")


class TestSelfTraining:
    def test_makes_flat_arrays_so_it_needs_the_layout(self, rows):
        X, y = rows
        partly = np.where(np.arange(60) < 30, y, -1)
        model = learner()
        model.set_params(svdspectrum__layout=X.layout)
        trained = SelfTrainingClassifier(model).fit(X, partly)
        assert trained.estimator_[0].layout_ == X.layout
        assert trained.score(X, y) > 0.9


class TestManyTargets:
    def test_one_regressor_for_each(self, X):
        targets = np.column_stack([np.arange(48.0), np.arange(48.0)[::-1]])
        net = GLNetRegressor(**QUICK)
        model = MultiOutputRegressor(net).fit(X, targets)
        single = net.fit(X, targets[:, 0])
        np.testing.assert_array_equal(model.predict(X)[:, 0], single.predict(X))
        assert model.estimators_[0].layout_ == X.layout

    def test_one_classifier_for_each(self, X, y):
        model = MultiOutputClassifier(gl_net()).fit(X, np.column_stack([y, 1 - y]))
        assert model.predict(X).shape == (48, 2)

    @pytest.mark.parametrize(("method", "n_kept"), [("predict_proba", 1), ("decision_function", 2)])
    def test_stacking_of_two_labels(self, method, n_kept, X, y):
        """Scikit-learn drops one of two probabilities, also where they are of two labels."""
        stack = StackingClassifier([("svd", svd())], svd()[1], cv=2, stack_method=method)
        stack.fit(X, np.column_stack([y, np.roll(y, 1)]))
        assert stack.final_estimator_.n_features_in_ == n_kept

    def test_chains_come_after_the_featurizer(self, rows):
        """A chain adds columns, which a layout has no place for."""
        X, y = rows
        targets = np.column_stack([y, 1 - y])
        chain = ClassifierChain(learner()[1], random_state=0)
        model = make_pipeline(SVDSpectrum(), chain).fit(X, targets)
        assert (model.predict(X) == targets).mean() > 0.9
        direct = ClassifierChain(learner()[1].set_params(layout=X.layout))
        with pytest.raises(ValueError, match="X has 39 columns"):
            direct.fit(X, targets)


class TestSampleWeight:
    @pytest.fixture(params=["gl-net", "svd"])
    def model(self, request):
        net = gl_net(**LEARNS) if request.param == "gl-net" else learner()[1]
        first = "passthrough" if request.param == "gl-net" else SVDSpectrum()
        return Pipeline([("features", first), ("model", net)])

    def routed(self, model):
        net = model[-1].set_fit_request(sample_weight=True)
        net.set_score_request(sample_weight=True)
        return model

    def test_by_prefix(self, model, rows, weights, flipped):
        X, y = rows
        assert model.fit(X, flipped).score(X, y) < 0.8
        assert model.fit(X, flipped, model__sample_weight=weights).score(X, y) > 0.9

    def test_by_prefix_through_a_search(self, model, rows, weights, flipped):
        X, y = rows
        search = GridSearchCV(model, {"model__weight_decay": [0.01]}, cv=2)
        assert search.fit(X, flipped, model__sample_weight=weights).score(X, y) > 0.9

    def test_routed_through_a_pipeline(self, model, rows, weights, flipped):
        X, y = rows
        with sklearn.config_context(enable_metadata_routing=True):
            self.routed(model).fit(X, flipped, sample_weight=weights)
            assert model.score(X, y, sample_weight=np.ones(60)) > 0.9
            assert model.score(X, flipped, sample_weight=weights) > 0.9
            assert model.score(X, flipped, sample_weight=1 - weights) < 0.1

    def test_routed_through_a_search_and_cross_validation(self, model, rows, weights, flipped):
        X, y = rows
        with sklearn.config_context(enable_metadata_routing=True):
            # The score of a pipeline asks for weights itself in scikit-learn 1.6, not its steps.
            weighted = make_scorer(accuracy_score).set_score_request(sample_weight=True)
            grid = {"model__weight_decay": [0.01]}
            search = GridSearchCV(self.routed(model), grid, cv=2, scoring=weighted)
            search.fit(X, flipped, sample_weight=weights)
            assert search.score(X, y) > 0.9
            # Scores count the weighted adapters alone, whose labels are not flipped.
            assert search.best_score_ > 0.9
            scores = cross_validate(
                model,
                X,
                flipped,
                cv=2,
                scoring=weighted,
                params={"sample_weight": weights},
                error_score="raise",
            )
        assert scores["test_score"].min() > 0.9

    def test_that_nobody_asked_for_is_an_error(self, model, rows, weights, flipped):
        X, _ = rows
        with (
            sklearn.config_context(enable_metadata_routing=True),
            pytest.raises(ValueError, match="sample_weight"),
        ):
            model.fit(X, flipped, sample_weight=weights)

    def test_requests(self):
        for net in (gl_net(), GLNetRegressor(), MLPNetClassifier(), MLPNetRegressor()):
            with sklearn.config_context(enable_metadata_routing=True):
                net.set_fit_request(sample_weight=True).set_score_request(sample_weight=False)
                net.set_partial_fit_request(sample_weight="adapter_weight")
                requests = get_routing_for_object(net)
            assert requests.fit.requests == {"sample_weight": True}
            assert requests.score.requests == {"sample_weight": False}
            assert requests.partial_fit.requests["sample_weight"] == "adapter_weight"
