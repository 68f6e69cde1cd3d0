"""The five architectures: their pipelines, one search over all, and Theorem 1 end to end."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV

from sklora import ARCHITECTURES, architecture_grid, make_architecture
from sklora.testing import assert_gauge_invariant

SHAPES = ((6, 4), (5, 4), (6, 4))
QUICK = {"model__max_epochs": 3, "model__hidden_dim": 4}
# Architectures invariant to any gauge, and to rotations.
INVARIANT = {"GL": {"svd", "dense", "gl-net"}, "O": {"o-align", "svd", "dense", "gl-net"}}


@pytest.fixture
def zoo(rng, random_loras):
    return random_loras(rng, n_adapters=60, shapes=SHAPES, rank=2)


@pytest.fixture
def labels(zoo):
    return np.array([adapter["m0"][0].sum() > 0 for adapter in zoo]).astype(int)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pipeline_fits_and_predicts(name, task, zoo, labels):
    model = make_architecture(name, task, random_state=0, device="cpu").set_params(**QUICK)
    assert list(model.named_steps) == ["features", "model"]
    predicted = clone(model).fit(zoo, labels).predict(zoo)
    assert predicted.shape == labels.shape
    np.testing.assert_array_equal(clone(model).fit(zoo, labels).predict(zoo), predicted)


def test_parameters_reach_both_steps(tmp_path):
    model = make_architecture(
        "o-align", device="cpu", random_state=3, memory=str(tmp_path), verbose=2
    )
    parameters = model.get_params()
    assert parameters["features__device"] == parameters["model__device"] == "cpu"
    assert parameters["features__random_state"] == parameters["model__random_state"] == 3
    assert parameters["memory"] == str(tmp_path)
    assert parameters["model__verbose"] == 2


def test_cached_features_change_nothing(tmp_path, zoo, labels):
    plain = make_architecture("svd", random_state=0).set_params(**QUICK)
    cached = make_architecture("svd", random_state=0, memory=str(tmp_path)).set_params(**QUICK)
    expected = plain.fit(zoo, labels).predict_proba(zoo)
    for _ in range(2):
        np.testing.assert_array_equal(cached.fit(zoo, labels).predict_proba(zoo), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cnn",), "architecture is 'cnn'; choose one of 'mlp', 'o-align'"),
        (("svd", "ranking"), "task is 'ranking'; choose one of 'classification'"),
    ],
)
def test_unknown_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_architecture(*arguments)


def quick_grid(task):
    return [
        entry | {name: [value] for name, value in QUICK.items()}
        for entry in architecture_grid(task, random_state=0)
    ]


@pytest.mark.parametrize("search", [GridSearchCV, HalvingGridSearchCV])
def test_one_search_chooses_among_all_five(search, zoo, labels):
    found = search(make_architecture("mlp"), quick_grid("classification"), cv=2)
    found.fit(zoo, labels)
    assert len({str(p) for p in found.cv_results_["params"]}) == len(ARCHITECTURES)
    winner = pickle.loads(pickle.dumps(found.best_estimator_))
    np.testing.assert_array_equal(winner.predict_proba(zoo), found.predict_proba(zoo))


def test_search_on_labels_in_workers(zoo, labels):
    multilabel = np.column_stack([labels, 1 - labels])
    search = GridSearchCV(make_architecture("mlp"), quick_grid("classification"), cv=2, n_jobs=2)
    assert search.fit(zoo, multilabel).predict(zoo).shape == multilabel.shape


@pytest.mark.parametrize(
    ("dtype", "condition", "rtol"),
    [(np.float64, 1e4, 1e-6), (np.float32, 1e2, 1e-3)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("group", ["GL", "O"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_theorem_1(name, group, dtype, condition, rtol, rng, random_loras):
    X = random_loras(rng, n_adapters=40, shapes=SHAPES, rank=2, dtype=dtype)
    y = np.array([np.einsum("ir,jr->", *adapter["m0"]) for adapter in X])
    model = make_architecture(name, "regression", random_state=0).set_params(
        model__max_epochs=20, model__hidden_dim=8
    )
    model.fit(X, y)

    def check():
        assert_gauge_invariant(
            model, X, group=group, condition=condition, rtol=rtol, random_state=1
        )

    if name in INVARIANT[group]:
        check()
    else:
        with pytest.raises(AssertionError):
            check()
