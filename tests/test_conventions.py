"""Scikit-learn's conventions, for every public estimator."""

from __future__ import annotations

import inspect
import os
import pickle
import re
import unittest

import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
from sklearn.base import BaseEstimator, clone, is_classifier, is_regressor
from sklearn.model_selection import GridSearchCV
from sklearn.utils import estimator_checks, get_tags
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks
from sklearn.utils.validation import check_is_fitted

import sklora
from sklora import (
    ARCHITECTURES,
    DenseProduct,
    GLEquivariantProjection,
    GLNetClassifier,
    GLNetRegressor,
    LoRACollection,
    LoRALayout,
    MLPNetClassifier,
    MLPNetRegressor,
    OAlign,
    SVDSpectrum,
    UpdateKernel,
    architecture_grid,
    make_architecture,
)

FEATURIZERS = [
    OAlign(),
    OAlign(template=0),
    SVDSpectrum(),
    DenseProduct(),
    DenseProduct("gram"),
    DenseProduct("gram", 2),
    DenseProduct("sketch"),
    GLEquivariantProjection(),
    GLEquivariantProjection(1, method="hosvd"),
    UpdateKernel(),
    UpdateKernel("cosine"),
    UpdateKernel("rbf"),
]
NETS = [
    GLNetClassifier(),
    GLNetClassifier(spectrum=True),
    GLNetRegressor(),
    GLNetRegressor(spectrum=True),
    MLPNetClassifier(),
    MLPNetRegressor(),
]
QUICK = {"hidden_dim": 4, "max_epochs": 2, "random_state": 0, "device": "cpu"}
QUICK_NETS = [clone(net).set_params(**QUICK) for net in NETS]

# What scikit-learn's own tests ask of its estimators beyond `check_estimator`.
CHECKS = [
    "check_dataframe_column_names_consistency",
    "check_inplace_ensure_writeable",
    "check_param_validation",
]
TRANSFORMER_CHECKS = [
    "check_get_feature_names_out_error",
    "check_global_output_transform_pandas",
    "check_global_set_output_transform_polars",
    "check_set_output_transform",
    "check_set_output_transform_pandas",
    "check_set_output_transform_polars",
    "check_transformer_get_feature_names_out",
    "check_transformer_get_feature_names_out_pandas",
]


def of_estimators(*estimators):
    return pytest.mark.parametrize("estimator", estimators, ids=repr)


def test_every_public_estimator_is_here():
    public = {
        value
        for value in map(vars(sklora).get, sklora.__all__)
        if inspect.isclass(value) and issubclass(value, BaseEstimator)
    }
    assert public == {type(estimator) for estimator in FEATURIZERS + NETS}


# A repeated row falls into other batches, and on both sides of the validation split.
NOT_EXACT = {
    "check_sample_weight_equivalence_on_dense_data": (
        "rows are drawn into batches, so weighting one is not repeating it exactly"
    )
}
if sklearn.__version__.startswith("1.6."):
    # It does not ask whether an estimator takes sparse X, as later versions do.
    NOT_EXACT["check_sample_weight_equivalence_on_sparse_data"] = "X has to be dense"


def expected_failures(estimator):
    return NOT_EXACT if type(estimator) in map(type, NETS) else {}


# Those of gl-net with a spectrum take as long as the rest; `test_check_estimator` runs them.
at_defaults = FEATURIZERS + [net for net in NETS if not net.get_params().get("spectrum")]
with_checks = parametrize_with_checks(at_defaults, expected_failed_checks=expected_failures)
names, cases = with_checks.args


# Scikit-learn 1.6 gives a generator of the cases, which pytest takes no more.
@pytest.mark.parametrize(names, list(cases), **with_checks.kwargs)
def test_checks_of_scikit_learn(estimator, check):
    try:
        check(estimator)
    except unittest.SkipTest as skipped:
        # It leaves out what needs SciPy's array API, a switch that SciPy reads when it is imported.
        if os.environ.get("SCIPY_ARRAY_API"):
            pytest.fail(f"a check was skipped: {skipped}")
        raise


@pytest.mark.slow
@of_estimators(*FEATURIZERS, *NETS)
def test_check_estimator(estimator):
    """The same checks, all of which run, and fail where they are expected to."""
    expected = expected_failures(estimator)
    results = check_estimator(estimator, expected_failed_checks=expected, on_skip=None)
    may_skip = set() if os.environ.get("SCIPY_ARRAY_API") else {"skipped"}
    assert {result["status"] for result in results} - may_skip <= {"passed", "xfail"}
    assert {r["check_name"] for r in results if r["status"] == "xfail"} == set(expected)


@of_estimators(*FEATURIZERS, *QUICK_NETS)
@pytest.mark.parametrize("check", CHECKS)
def test_further_checks(estimator, check):
    getattr(estimator_checks, check)(type(estimator).__name__, clone(estimator))


# Some of them fit data frames and transform arrays.
@pytest.mark.filterwarnings("ignore:X (has|does not have valid) feature names")
@of_estimators(*FEATURIZERS)
@pytest.mark.parametrize("check", TRANSFORMER_CHECKS)
def test_further_checks_of_transformers(estimator, check):
    getattr(estimator_checks, check)(type(estimator).__name__, clone(estimator))


@of_estimators(*FEATURIZERS, *QUICK_NETS)
def test_unfitted_survives_pickle_clone_and_parameters(estimator):
    layout = LoRALayout([("q", 3, 2, 1)])
    estimator = clone(estimator).set_params(layout=layout)
    for twin in (pickle.loads(pickle.dumps(estimator)), clone(estimator)):
        assert type(twin) is type(estimator)
        assert twin.get_params() == estimator.get_params()
        assert twin.layout == layout
        with pytest.raises(ValueError, match="not fitted"):
            check_is_fitted(twin)
    with pytest.raises(ValueError, match="Invalid parameter 'depth'"):
        estimator.set_params(depth=3)


@of_estimators(*FEATURIZERS, *NETS)
def test_parameters_are_kept_as_they_are_given(estimator):
    given = {name: object() for name in estimator.get_params()}
    assert type(estimator)(**given).get_params() == given


class TestTags:
    @of_estimators(*FEATURIZERS, *NETS)
    def test_of_all(self, estimator):
        tags = get_tags(estimator)
        assert tags.requires_fit
        assert not tags.no_validation
        assert not tags.non_deterministic
        assert tags.input_tags.two_d_array
        assert not tags.input_tags.sparse
        assert not tags.input_tags.allow_nan
        assert not tags.input_tags.pairwise

    @of_estimators(*FEATURIZERS)
    def test_of_transformers(self, estimator):
        tags = get_tags(estimator)
        assert tags.estimator_type is None
        assert not tags.target_tags.required
        assert tags.transformer_tags.preserves_dtype == ["float64", "float32"]

    @of_estimators(*NETS)
    def test_of_nets(self, estimator):
        tags = get_tags(estimator)
        assert tags.target_tags.required
        assert tags.target_tags.single_output
        assert tags.transformer_tags is None
        classifies = isinstance(estimator, (GLNetClassifier, MLPNetClassifier))
        assert is_classifier(estimator) == classifies
        assert is_regressor(estimator) != classifies
        if classifies:
            assert tags.classifier_tags.multi_class
            assert tags.classifier_tags.multi_label
            # Several classes for one adapter are refused.
            assert not tags.target_tags.multi_output
        else:
            assert tags.target_tags.multi_output

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_of_pipelines(self, architecture):
        assert is_classifier(make_architecture(architecture))
        assert is_regressor(make_architecture(architecture, "regression"))


@pytest.fixture
def X(random_loras, rng):
    return random_loras(rng, 9, ((6, 4), (5, 4)), 2)


FRAMES = pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])


class TestNamesOfTheFlatForm:
    @FRAMES
    @of_estimators(*FEATURIZERS, *QUICK_NETS)
    def test_are_learnt_and_compared(self, estimator, frame, X):
        columns = X.layout.feature_names()
        flat = frame(dict(zip(columns, np.asarray(X).T, strict=True)))
        estimator = clone(estimator).set_params(layout=X.layout).fit(flat, np.arange(9) % 2)
        assert estimator.feature_names_in_.tolist() == columns
        apply = estimator.transform if hasattr(estimator, "transform") else estimator.predict
        np.testing.assert_array_equal(apply(flat), apply(X))
        with pytest.raises(ValueError, match="Feature names must be in the same order"):
            apply(flat[columns[::-1]])
        other = frame(dict(zip(["bias", *columns[1:]], np.asarray(X).T, strict=True)))
        with pytest.raises(ValueError, match=re.escape(f"yet now missing:\n- {columns[0]}")):
            apply(other)
        with pytest.warns(UserWarning, match="X does not have valid feature names"):
            apply(np.asarray(X))
        # A collection has modules, which are compared instead.
        assert not hasattr(estimator.fit(X, np.arange(9) % 2), "feature_names_in_")

    @of_estimators(*FEATURIZERS)
    def test_are_checked_as_input_features(self, estimator, X):
        columns = X.layout.feature_names()
        fitted = clone(estimator).set_params(layout=X.layout)
        fitted.fit(pd.DataFrame(np.asarray(X), columns=columns))
        expected = fitted.get_feature_names_out().tolist()
        assert fitted.get_feature_names_out(columns).tolist() == expected
        with pytest.raises(ValueError, match="input_features is not equal to feature_names_in_"):
            fitted.get_feature_names_out(columns[::-1])
        fitted.fit(X)
        assert fitted.get_feature_names_out(columns[::-1]).tolist() == expected
        with pytest.raises(ValueError, match=rf"number of features \({X.shape[1]}\)"):
            fitted.get_feature_names_out(columns[:-1])

    def test_of_aligned_weights_are_those_of_their_layout(self, X):
        for step in (OAlign(), GLEquivariantProjection(3)):
            moved = step.fit_transform(X)
            assert isinstance(moved, LoRACollection)
            assert step.get_feature_names_out().tolist() == moved.layout.feature_names()


class TestDisplay:
    @of_estimators(*FEATURIZERS, *QUICK_NETS)
    def test_renders_before_and_after_fit(self, estimator, X):
        estimator = clone(estimator).set_params(layout=X.layout)
        for _ in range(2):
            page = estimator._repr_html_()
            assert type(estimator).__name__ in page
            assert "LoRALayout(n_modules=2, width=38)" in page
            assert len(page) < 200_000
            estimator.fit(X, np.arange(9) % 2)

    @of_estimators(*QUICK_NETS)
    def test_renders_where_the_device_is_missing(self, estimator, X):
        model = clone(estimator).fit(X, np.arange(9) % 2).set_params(device="cuda:99")
        assert "cuda:99" in model._repr_html_()
        assert not hasattr(model, "net_")
        with pytest.raises(ValueError, match=r"device='cuda:99' does not exist"):
            model.predict(X)

    @pytest.mark.parametrize("task", ["classification", "regression"])
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_of_pipelines(self, architecture, task):
        pipeline = make_architecture(architecture, task)
        page = pipeline._repr_html_()
        for step in pipeline.named_steps.values():
            assert type(step).__name__ in page or step == "passthrough"

    def test_of_searches(self):
        search = GridSearchCV(make_architecture("svd"), architecture_grid())
        assert "SVDSpectrum" in search._repr_html_()
