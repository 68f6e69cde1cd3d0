"""Featurization and searches on a dask cluster, through joblib: workers get paths, not weights."""

import os

import joblib
import numpy as np
import pytest
import sklearn
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from sklora import (
    GLEquivariantProjection,
    LoRACollection,
    MLPNetClassifier,
    OAlign,
    SVDSpectrum,
    UpdateKernel,
)

distributed = pytest.importorskip("distributed")
cloudpickle = pytest.importorskip("cloudpickle")

N_ADAPTERS, SHAPES = 64, ((96, 80), (96, 80), (64, 96))


@pytest.fixture(scope="module")
def client():
    """Start two worker processes, and no dashboard."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def zoo(random_loras, rng, tmp_path):
    """Save a zoo; open it."""
    random_loras(rng, N_ADAPTERS, SHAPES, 4).save(tmp_path / "zoo.safetensors")
    return LoRACollection.open(tmp_path / "zoo.safetensors")


def where(X):
    """Give the process that this runs in, and the bytes of X as a message."""
    return os.getpid(), len(cloudpickle.dumps(X))


@pytest.mark.parametrize(
    "featurizer",
    [
        SVDSpectrum(),
        OAlign(template=0),
        GLEquivariantProjection(8, method="hosvd"),
        UpdateKernel(),
    ],
    ids=str,
)
def test_featurization(client, zoo, featurizer):
    expected = np.asarray(featurizer.fit_transform(zoo))
    before = client.run(lambda dask_worker: dask_worker.state.transition_counter)
    with joblib.parallel_config("dask"), sklearn.config_context(working_memory=0.5):
        found = np.asarray(featurizer.fit(zoo).transform(zoo))
    after = client.run(lambda dask_worker: dask_worker.state.transition_counter)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert all(after[worker] > before[worker] for worker in before)


def test_a_search(client, zoo):
    y = np.arange(N_ADAPTERS) % 2
    model = make_pipeline(SVDSpectrum(device="cpu"), RidgeClassifier())
    grid = {"ridgeclassifier__alpha": [0.1, 1.0, 10.0]}
    searches = [GridSearchCV(model, grid, cv=3) for _ in range(2)]
    searches[0].fit(zoo, y)
    with joblib.parallel_config("dask"):
        searches[1].fit(zoo, y)
    first, second = (search.cv_results_["mean_test_score"] for search in searches)
    np.testing.assert_array_equal(first, second)


def test_a_search_over_networks(client, zoo):
    y = np.arange(N_ADAPTERS) % 2
    model = make_pipeline(
        SVDSpectrum(device="cpu"), MLPNetClassifier(max_epochs=2, random_state=0, device="cpu")
    )
    with joblib.parallel_config("dask"):
        search = GridSearchCV(model, {"mlpnetclassifier__lr": [1e-3, 1e-2]}, cv=2).fit(zoo, y)
    assert search.best_estimator_.predict(zoo).shape == (N_ADAPTERS,)


def test_workers_get_paths_and_not_weights(client, zoo):
    with joblib.parallel_config("dask"):
        found = joblib.Parallel()(joblib.delayed(where)(zoo[rows::2]) for rows in (0, 1))
    for process, size in found:
        assert process != os.getpid()
        assert size < 5_000 < zoo.nbytes / 100
    in_memory = LoRACollection.from_array(zoo.read(), zoo.layout, ranks=zoo.ranks)
    assert where(in_memory)[1] > zoo.nbytes
