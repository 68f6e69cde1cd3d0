"""What holds for every featurizer."""

import pickle

import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics.pairwise import pairwise_kernels
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags

from sklora.collection import LoRACollection, LoRALayout
from sklora.transform import (
    SVDSpectrum,
    UpdateKernel,
)


@pytest.mark.parametrize("kind", ["X", "mixed", "with_side"])
def test_a_flat_array_with_its_layout_equals_the_collection(featurizer, kind, request):
    X = request.getfixturevalue(kind)
    expected = np.asarray(featurizer.fit_transform(X))
    flat = clone(featurizer).set_params(layout=X.layout)
    found = flat.fit_transform(np.asarray(X))
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, expected)
    # An array is read by the layout seen in fit, whether that came with a collection or not.
    np.testing.assert_allclose(featurizer.transform(np.asarray(X)), expected, atol=1e-13)
    np.testing.assert_allclose(np.asarray(flat.transform(X)), expected, atol=1e-13)


def test_output_keeps_the_precision_of_the_input(featurizer, X):
    single = LoRACollection.from_array(np.asarray(X).astype(np.float32), X.layout)
    expected = featurizer.fit_transform(X)
    found = featurizer.fit_transform(single)
    assert expected.dtype == np.float64
    assert found.dtype == np.float32
    for learned in ("left_", "right_"):
        assert {A.dtype for A in getattr(featurizer, learned, {}).values()} <= {found.dtype}
    assert clone(featurizer).fit(X).transform(single).dtype == np.float32
    assert get_tags(featurizer).transformer_tags.preserves_dtype == ["float64", "float32"]
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=1e-4)


def test_half_precision_storage_is_read_as_float32(featurizer, X):
    half = LoRACollection.from_array(np.asarray(X).astype(np.float16), X.layout)
    assert featurizer.fit_transform(half).dtype == np.float32


def in_jobs(featurizer, n_jobs):
    """A clone that works in so many jobs, if it knows of jobs."""
    parameters = featurizer.get_params().keys() & {"n_jobs"}
    return clone(featurizer).set_params(**dict.fromkeys(parameters, n_jobs))


@pytest.mark.parametrize("kind", ["X", "mixed", "with_side"])
def test_two_jobs_and_small_blocks_equal_one(featurizer, kind, request):
    X = request.getfixturevalue(kind)
    expected = np.asarray(featurizer.fit_transform(X))
    parallel = in_jobs(featurizer, 2)
    np.testing.assert_allclose(np.asarray(parallel.fit_transform(X)), expected, atol=1e-12)
    for working_memory in (1e-6, 0.05):
        with sklearn.config_context(working_memory=working_memory):
            found = clone(featurizer).fit_transform(X)
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-12)


def test_more_jobs_than_adapters(featurizer, X):
    expected = np.asarray(featurizer.fit_transform(X))
    parallel = in_jobs(featurizer, 4).fit(X)
    np.testing.assert_allclose(np.asarray(parallel.transform(X[:2])), expected[:2], atol=1e-12)


def test_a_memory_map_equals_memory(featurizer, mixed, tmp_path):
    flat = np.asarray(mixed)
    np.save(tmp_path / "zoo.npy", flat)
    mapped = np.load(tmp_path / "zoo.npy", mmap_mode="r")
    X = LoRACollection.from_array(mapped, mixed.layout)
    expected = np.asarray(featurizer.fit_transform(mixed))
    found = in_jobs(featurizer, 2).fit_transform(X)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-12)


def test_one_adapter_equals_many(featurizer, mixed):
    many = np.asarray(featurizer.fit_transform(mixed))
    for position in range(len(mixed)):
        one = np.asarray(featurizer.transform(mixed[[position]]))
        np.testing.assert_allclose(one[0], many[position], atol=1e-12)


def test_a_device_of_torch_is_one(featurizer, X):
    expected = np.asarray(featurizer.fit_transform(X))
    featurizer.set_params(device=torch.device("cpu"))
    np.testing.assert_array_equal(np.asarray(featurizer.fit_transform(X)), expected)


def test_clone_and_pickle(featurizer, X):
    expected = np.asarray(featurizer.fit(X).transform(X))
    with pytest.raises(NotFittedError):
        clone(featurizer).transform(X)
    copy = pickle.loads(pickle.dumps(featurizer))
    np.testing.assert_array_equal(np.asarray(copy.transform(X)), expected)


def test_a_refit_learns_anew(featurizer, X, random_loras, rng):
    other = random_loras(rng, 12, ((7, 3),), 2)
    expected = np.asarray(clone(featurizer).fit_transform(other))
    featurizer.fit(X)
    np.testing.assert_array_equal(np.asarray(featurizer.fit_transform(other)), expected)
    assert featurizer.layout_ == other.layout
    assert featurizer.n_features_in_ == other.layout.width


def has_no_modules(featurizer):
    """Whether each column is of all modules together."""
    return isinstance(featurizer, UpdateKernel) or getattr(featurizer, "method", None) == "gram"


@pytest.mark.parametrize("kind", ["X", "mixed", "with_side"])
def test_names_of_the_columns(featurizer, kind, request):
    X = request.getfixturevalue(kind)
    with pytest.raises(NotFittedError):
        featurizer.get_feature_names_out()
    output = np.asarray(featurizer.fit_transform(X))
    with pytest.raises(ValueError, match="input_features"):
        featurizer.get_feature_names_out(["one"])
    names = featurizer.get_feature_names_out()
    assert names.dtype == object
    assert len(names) == len(set(names)) == output.shape[1]
    if kind == "with_side" and not isinstance(featurizer, UpdateKernel):
        assert names[-4:].tolist() == ["scale", "magnitude:0", "magnitude:1", "magnitude:2"]
        names = names[:-4]
    if has_no_modules(featurizer):
        prefix = type(featurizer).__name__.lower()
        assert names.tolist() == [f"{prefix}{position}" for position in range(len(names))]
        return
    modules = [name.split(":")[0] for name in names]
    assert list(dict.fromkeys(modules)) == list(X.layout.names)


def test_side_features_stay_as_the_last_columns_or_are_not_compared(featurizer, with_side):
    if isinstance(featurizer, UpdateKernel):
        bare = with_side.layout.side_slice.start
        layout = LoRALayout(with_side.layout.modules)
        without = LoRACollection.from_array(np.asarray(with_side)[:, :bare], layout)
        expected = clone(featurizer).fit_transform(without)
        np.testing.assert_allclose(featurizer.fit_transform(with_side), expected, atol=1e-12)
        return
    for output in (featurizer.fit_transform(with_side), featurizer.transform(with_side)):
        np.testing.assert_array_equal(np.asarray(output)[:, -4:], np.asarray(with_side)[:, -4:])


@pytest.mark.parametrize(("library", "frame"), [("pandas", pd.DataFrame), ("polars", pl.DataFrame)])
def test_set_output_gives_data_frames_of_features(to_features, X, library, frame):
    expected = to_features.fit_transform(X)
    to_features.set_output(transform=library)
    for output in (to_features.fit_transform(X), to_features.transform(X)):
        assert isinstance(output, frame)
        assert list(output.columns) == to_features.get_feature_names_out().tolist()
        np.testing.assert_allclose(output.to_numpy(), expected, atol=1e-13)


@pytest.mark.parametrize(("library", "frame"), [("pandas", pd.DataFrame), ("polars", pl.DataFrame)])
def test_set_output_leaves_collections_of_weights_alone(to_weights, X, library, frame):
    expected = np.asarray(to_weights.fit_transform(X))
    to_weights.set_output(transform=library)
    with sklearn.config_context(transform_output=library):
        for output in (to_weights.fit_transform(X), to_weights.transform(X)):
            assert isinstance(output, LoRACollection)
            np.testing.assert_array_equal(np.asarray(output), expected)
    output = to_weights.transform(np.asarray(X))
    assert isinstance(output, frame)
    assert list(output.columns) == to_weights.get_feature_names_out().tolist()
    np.testing.assert_array_equal(output.to_numpy(), expected)


def test_weights_stay_a_collection_of_the_same_adapters(to_weights, mixed, with_side):
    named = LoRACollection.from_array(
        np.asarray(mixed), mixed.layout, ids=[f"a{i}" for i in range(9)]
    )
    output = to_weights.fit_transform(named)
    assert isinstance(output, LoRACollection)
    assert output.ids.tolist() == named.ids.tolist()
    assert output.layout.names == named.layout.names
    assert ((output.ranks == 0) == (named.ranks == 0)).all()
    assert to_weights.fit_transform(with_side).layout.side == with_side.layout.side


def test_any_step_can_follow(featurizer, X):
    pipeline = make_pipeline(featurizer, StandardScaler())
    output = pipeline.fit_transform(X)
    assert output.shape == np.asarray(featurizer.transform(X)).shape
    assert pipeline.set_output(transform="pandas").fit(X) is pipeline


def test_features_of_moved_weights(to_weights, to_features, X):
    """A weights-to-weights step feeds its collection to the next step, layout and all."""
    output = make_pipeline(to_weights, to_features).fit_transform(X)
    np.testing.assert_array_equal(output, to_features.fit_transform(to_weights.transform(X)))
    assert to_features.layout_ == to_weights.transform(X).layout


def test_plain_rows(featurizer, rng):
    """Without a layout, a row is one update (n_features, 1) with V = 1."""
    rows = rng.normal(size=(9, 5))
    output = featurizer.fit_transform(rows)
    assert isinstance(output, np.ndarray)
    assert len(featurizer.get_feature_names_out()) == output.shape[1]
    assert featurizer.layout_ == LoRALayout.rows(5)
    if isinstance(featurizer, SVDSpectrum):
        np.testing.assert_allclose(output[:, 0], np.linalg.norm(rows, axis=1), rtol=1e-12)
    elif hasattr(featurizer, "left_"):
        np.testing.assert_allclose(output, rows @ featurizer.left_["row"].T, rtol=1e-12)
    elif isinstance(featurizer, UpdateKernel):
        expected = pairwise_kernels(
            rows, metric=featurizer.kernel, filter_params=True, gamma=featurizer.gamma_
        )
        np.testing.assert_allclose(output, expected, atol=1e-12)
    elif has_no_modules(featurizer):
        np.testing.assert_allclose(output @ output.T, rows @ rows.T, atol=1e-12)
    else:
        np.testing.assert_array_equal(output, rows)


def test_explicit_device(featurizer, X):
    expected = np.asarray(featurizer.fit_transform(X))
    featurizer.set_params(device="cpu")
    found = np.asarray(featurizer.fit_transform(X))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


class TestBadInput:
    """Every one is a ValueError, and leaves the estimator as it was."""

    @pytest.fixture
    def fitted(self, featurizer, X):
        return featurizer.fit(X)

    @pytest.fixture(autouse=True)
    def unchanged(self, fitted, X):
        before, expected = dict(vars(fitted)), np.asarray(fitted.transform(X))
        yield
        for name, value in before.items():
            if name.endswith("_"):
                assert vars(fitted)[name] is value
        assert vars(fitted).keys() == before.keys()
        np.testing.assert_array_equal(np.asarray(fitted.transform(X)), expected)

    @pytest.mark.parametrize("method", ["fit", "fit_transform", "transform"])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, fitted, X, method, value):
        flat = np.array(X)
        flat[4, X.layout.factor_slices[1][0].start] = value
        bad = LoRACollection.from_array(flat, X.layout, ids=X.ids)
        with pytest.raises(ValueError, match="'adapter-4' has NaN or infinity in module 'm1'"):
            getattr(fitted, method)(bad)

    def test_what_overflows(self, fitted, X):
        """In `fit_transform` it is found after the fit, which is undone."""
        huge = LoRACollection.from_array(np.sign(np.asarray(X)) * 1.7e308, X.layout, ids=X.ids)
        with pytest.raises(ValueError, match="what is computed from them overflows"):
            fitted.fit_transform(huge)

    @pytest.mark.parametrize("method", ["fit", "transform"])
    def test_empty(self, fitted, X, method):
        with pytest.raises(ValueError, match="0 adapters"):
            getattr(fitted, method)(X[:0])

    @pytest.mark.parametrize("method", ["fit", "transform"])
    @pytest.mark.parametrize(
        "container",
        [sparse.csr_array, sparse.csr_matrix, sparse.dok_array],
        ids=lambda c: c.__name__,
    )
    def test_sparse(self, fitted, X, method, container):
        with pytest.raises(ValueError, match="sparse"):
            getattr(fitted, method)(container(np.asarray(X)))

    @pytest.mark.parametrize("method", ["fit", "transform"])
    def test_mappings(self, fitted, X, method):
        with pytest.raises(ValueError, match=r"LoRACollection\.from_factors"):
            getattr(fitted, method)([dict(adapter) for adapter in X])

    def test_other_modules(self, fitted, random_loras, rng):
        other = random_loras(rng, 4, ((6, 4), (5, 3)), 3)
        with pytest.raises(ValueError, match=r"'m1' has updates of shape \(5, 3\), but \(5, 4\)"):
            fitted.transform(other)

    def test_other_width(self, fitted, X):
        with pytest.raises(ValueError, match=r"X has 116 features, but .* is expecting 117"):
            fitted.transform(np.asarray(X)[:, :-1])

    def test_layout_of_another_width(self, fitted, X):
        layout = fitted.layout
        fitted.set_params(layout=LoRALayout([("q", 3, 3, 1)]))
        try:
            with pytest.raises(ValueError, match="layout"):
                fitted.fit(np.asarray(X))
        finally:
            fitted.set_params(layout=layout)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("device", 3), ("device", "abacus"), ("n_jobs", "two"), ("verbose", "much")),
            ("layout", [("q", 3, 3, 1)]),
        ],
    )
    def test_parameters(self, fitted, X, name, value):
        if name not in fitted.get_params():
            return
        good = getattr(fitted, name)
        fitted.set_params(**{name: value})
        try:
            with pytest.raises(ValueError, match=name):
                fitted.fit(X)
        finally:
            fitted.set_params(**{name: good})
