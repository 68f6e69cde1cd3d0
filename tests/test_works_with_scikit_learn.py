"""Featurizers and networks in scikit-learn's machinery, on collections in memory and mapped."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.ensemble import BaggingClassifier, StackingClassifier, VotingClassifier
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    cross_val_predict,
    cross_val_score,
    learning_curve,
    permutation_test_score,
    train_test_split,
)
from sklearn.pipeline import make_pipeline, make_union

from sklora import (
    DenseProduct,
    GLNetClassifier,
    GLNetRegressor,
    LoRACollection,
    MLPNetClassifier,
    OAlign,
    SVDSpectrum,
)

QUICK = {"hidden_dim": 4, "max_epochs": 2, "random_state": 0, "device": "cpu"}


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
