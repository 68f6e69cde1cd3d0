"""Data frames out of featurizers that stand in pipelines, unions and column transformers."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import StandardScaler

from sklora import DenseProduct, GLEquivariantProjection, LoRACollection, OAlign, SVDSpectrum

LIBRARIES = pytest.mark.parametrize(
    ("library", "frame"), [("pandas", pd.DataFrame), ("polars", pl.DataFrame)]
)


@pytest.fixture
def flat(X):
    """The adapters as a data frame with a name for every column and every row."""
    return pd.DataFrame(np.asarray(X), index=X.ids, columns=X.layout.feature_names())


def assert_frame(output, frame, transformer, expected):
    assert isinstance(output, frame)
    assert list(output.columns) == transformer.get_feature_names_out().tolist()
    np.testing.assert_allclose(output.to_numpy(), expected, atol=1e-12)


@LIBRARIES
def test_pipeline_of_a_collection(library, frame, X):
    pipeline = make_pipeline(OAlign(template=0), SVDSpectrum(), StandardScaler())
    expected = pipeline.fit_transform(X)
    pipeline.set_output(transform=library)
    for output in (pipeline.fit_transform(X), pipeline.transform(X)):
        assert_frame(output, frame, pipeline, expected)
    names = X.layout.feature_names()
    assert pipeline.get_feature_names_out(names).tolist()[0] == "m0:s0"
    assert pipeline[-1].feature_names_in_.tolist() == pipeline.get_feature_names_out().tolist()
    assert isinstance(pipeline[0].transform(X), LoRACollection)


@LIBRARIES
@pytest.mark.parametrize(
    "steps",
    [
        (SVDSpectrum(), DenseProduct()),
        (OAlign(template=0), SVDSpectrum()),
        (OAlign(template=0), GLEquivariantProjection(3, random_state=0)),
    ],
    ids=["features", "both", "weights"],
)
def test_union_of_a_collection(library, frame, steps, X):
    union = make_union(*steps)
    expected = union.fit_transform(X)
    assert isinstance(expected, np.ndarray)
    union.set_output(transform=library)
    for output in (union.fit_transform(X), union.transform(X)):
        assert_frame(output, frame, union, expected)


@LIBRARIES
@pytest.mark.parametrize("kind", ["array", "collection", "frame"])
def test_column_transformer(library, frame, kind, X, flat):
    given = {
        "array": np.asarray(X),
        "collection": X,
        "frame": flat if library == "pandas" else pl.from_pandas(flat),
    }[kind]
    columns = X.layout.feature_names() if kind == "frame" else np.arange(X.shape[1])
    transformer = ColumnTransformer(
        [
            ("svd", SVDSpectrum(layout=X.layout), columns),
            ("aligned", OAlign(template=0, layout=X.layout), columns),
        ]
    ).set_output(transform=library)
    expected = np.hstack(
        [SVDSpectrum().fit_transform(X), np.asarray(OAlign(template=0).fit_transform(X))]
    )
    for output in (transformer.fit_transform(given), transformer.transform(given)):
        assert_frame(output, frame, transformer, expected)
    assert output.columns[0] == "svd__m0:s0"
    assert output.columns[-1].startswith("aligned__m3:V")


def test_rows_of_a_data_frame_keep_their_names(featurizer, X, flat):
    featurizer.set_params(layout=X.layout).set_output(transform="pandas")
    for output in (featurizer.fit_transform(flat), featurizer.transform(flat)):
        assert output.index.tolist() == X.ids.tolist()
    assert featurizer.feature_names_in_.tolist() == X.layout.feature_names()


def test_rows_of_a_collection_are_numbered(to_features, X):
    to_features.set_output(transform="pandas")
    for output in (to_features.fit_transform(X), to_features.transform(X)):
        assert isinstance(output.index, pd.RangeIndex)


@LIBRARIES
def test_weights_of_a_data_frame_are_an_array_unless_asked(to_weights, library, frame, X, flat):
    to_weights.set_params(layout=X.layout)
    given = flat if library == "pandas" else pl.from_pandas(flat)
    expected = np.asarray(to_weights.fit_transform(X))
    output = to_weights.fit_transform(given)
    assert isinstance(output, np.ndarray)
    np.testing.assert_allclose(output, expected, atol=1e-12)
    to_weights.set_output(transform=library)
    for output in (to_weights.fit_transform(given), to_weights.transform(given)):
        assert_frame(output, frame, to_weights, expected)
