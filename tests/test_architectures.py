"""The five architectures: their pipelines, one search over all, and Theorem 1 end to end."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV
from sklearn.pipeline import Pipeline

from sklora import (
    ARCHITECTURES,
    DenseProduct,
    GLNetClassifier,
    GLNetRegressor,
    LoRACollection,
    MLPNetClassifier,
    MLPNetRegressor,
    OAlign,
    SVDSpectrum,
    architecture_grid,
    make_architecture,
)
from sklora.testing import assert_gauge_invariant

SHAPES = ((6, 4), (5, 4), (6, 4))
TASKS = ("classification", "regression")
FEATURES = {"mlp": str, "o-align": OAlign, "svd": SVDSpectrum, "dense": DenseProduct, "gl-net": str}
QUICK = {"model__max_epochs": 3, "model__hidden_dim": 4}
# Architectures invariant to any gauge, and to rotations.
INVARIANT = {"GL": {"svd", "dense", "gl-net"}, "O": {"o-align", "svd", "dense", "gl-net"}}


@pytest.fixture
def zoo(rng, random_loras):
    return random_loras(rng, n_adapters=60, shapes=SHAPES, rank=2)


@pytest.fixture
def labels(zoo):
    return np.array([adapter["m0"][0].sum() > 0 for adapter in zoo]).astype(int)


@pytest.fixture
def targets(labels, rng):
    """Two of which one is `labels`, for either task."""
    return {
        "classification": np.column_stack([labels, 1 - labels]),
        "regression": np.column_stack([labels, rng.normal(size=60)]),
    }


def model_type(name, task):
    if task == "classification":
        return GLNetClassifier if name == "gl-net" else MLPNetClassifier
    return GLNetRegressor if name == "gl-net" else MLPNetRegressor


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pipeline_fits_and_predicts(name, task, zoo, labels):
    model = make_architecture(name, task, random_state=0, device="cpu").set_params(**QUICK)
    assert list(model.named_steps) == ["features", "model"]
    predicted = clone(model).fit(zoo, labels).predict(zoo)
    assert predicted.shape == labels.shape
    np.testing.assert_array_equal(clone(model).fit(zoo, labels).predict(zoo), predicted)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_many_targets(name, task, zoo, targets):
    model = make_architecture(name, task, random_state=0).set_params(**QUICK)
    model.fit(zoo, targets[task])
    assert model.predict(zoo).shape == (60, 2)
    assert np.isfinite(model.score(zoo, targets[task]))
    if task == "classification":
        assert set(np.unique(model.predict(zoo))) <= {0, 1}
        assert np.shape(model.predict_proba(zoo)) == (60, 2)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_reach_both_steps(name, task, tmp_path):
    options = {"device": "cpu", "random_state": 3, "memory": str(tmp_path), "verbose": 2}
    pipeline = make_architecture(name, task, **options)
    parameters = clone(pipeline).get_params()
    assert type(parameters["features"]) is FEATURES[name]
    assert type(parameters["model"]) is model_type(name, task)
    assert parameters["model__device"] == parameters.get("features__device", "cpu") == "cpu"
    assert parameters["model__random_state"] == parameters.get("features__random_state", 3) == 3
    assert parameters["memory"] == str(tmp_path)
    assert parameters["model__verbose"] == 2
    assert pipeline.verbose is False


@pytest.mark.parametrize("task", TASKS)
def test_grid_is_the_pipelines(task):
    grid = architecture_grid(task, device="cpu", random_state=3)
    assert len(grid) == len(ARCHITECTURES) + 1
    for name, entry in zip(ARCHITECTURES, grid, strict=False):
        pipeline = make_architecture(name, task, device="cpu", random_state=3)
        assert entry.keys() == pipeline.named_steps.keys()
        for step, [candidate] in entry.items():
            assert str(candidate) == str(pipeline.named_steps[step])
    assert grid[-1]["features"][0]["kernel"].device == "cpu"


def test_defaults():
    said = {"task": "classification", "device": "auto", "random_state": None}
    model, expected = make_architecture("o-align"), make_architecture("o-align", **said)
    assert str(model.get_params()) == str(expected.get_params())
    assert str(architecture_grid()) == str(architecture_grid(**said))


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


def test_grid_of_an_unknown_task():
    with pytest.raises(ValueError, match="task is 'ranking'; choose one of 'classification'"):
        architecture_grid("ranking")


def quick_grid(task):
    return [
        entry if "model__alpha" in entry else entry | {k: [v] for k, v in QUICK.items()}
        for entry in architecture_grid(task, random_state=0)
    ]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("search", [GridSearchCV, HalvingGridSearchCV])
def test_one_search_chooses_among_all(search, task, zoo, labels):
    found = search(make_architecture("mlp", task), quick_grid(task), cv=2, error_score="raise")
    found.fit(zoo, labels)
    tried = found.cv_results_["params"]
    steps = {(type(p["features"]), type(p["model"])) for p in tried}
    ridge = RidgeClassifier if task == "classification" else Ridge
    nets = {(FEATURES[name], model_type(name, task)) for name in ARCHITECTURES}
    assert steps == nets | {(Pipeline, ridge)}
    assert np.isfinite(found.cv_results_["mean_test_score"]).all()
    best = found.best_estimator_
    assert str(best.named_steps["features"]) == str(found.best_params_["features"])
    refitted = clone(best).fit(zoo, labels)
    np.testing.assert_array_equal(refitted.predict(zoo), found.predict(zoo))
    winner = pickle.loads(pickle.dumps(best))
    method = "decision_function" if task == "classification" else "predict"
    np.testing.assert_array_equal(getattr(winner, method)(zoo), getattr(found, method)(zoo))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_of_the_five_can_win(name, zoo, labels):
    def score(pipeline, X, y):
        steps = pipeline.named_steps
        wanted = (FEATURES[name], model_type(name, "classification"))
        return float((type(steps["features"]), type(steps["model"])) == wanted)

    grid = quick_grid("classification")
    search = GridSearchCV(make_architecture("mlp"), grid, cv=2, scoring=score).fit(zoo, labels)
    assert search.best_index_ == ARCHITECTURES.index(name)
    winner = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(winner.predict_proba(zoo), search.predict_proba(zoo))


def test_search_on_labels_in_workers(zoo, targets):
    multilabel = targets["classification"]
    search = GridSearchCV(make_architecture("mlp"), quick_grid("classification"), cv=2, n_jobs=2)
    assert search.fit(zoo, multilabel).predict(zoo).shape == multilabel.shape


@pytest.mark.parametrize(
    ("dtype", "condition", "rtol"),
    [(np.float64, 1e4, 1e-9), (np.float32, 1e2, 1e-4)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("group", ["GL", "O"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_theorem_1(name, task, group, dtype, condition, rtol, rng, random_loras):
    X = random_loras(rng, n_adapters=40, shapes=SHAPES, rank=2, dtype=dtype)
    y = np.array([[np.einsum("ir,jr->", *adapter[m]) for m in ("m0", "m1")] for adapter in X])
    model = make_architecture(name, task, random_state=0)
    model.set_params(model__max_epochs=20, model__hidden_dim=8, model__lr=1e-2)
    model.fit(X, y if task == "regression" else (y > 0).astype(int))

    def check():
        assert_gauge_invariant(
            model, X, group=group, condition=condition, rtol=rtol, random_state=1
        )

    if name in INVARIANT[group]:
        check()
    else:
        with pytest.raises(AssertionError, match=rf"is not invariant to {group}\(r\)"):
            check()


class TestKernelRoute:
    """The second route of dense in the grid."""

    @pytest.fixture
    def make_model(self):
        def make_model(task, alpha=0.1):
            *_, entry = architecture_grid(task, device="cpu")
            steps = {name: entry[name][0] for name in ("features", "model")}
            return clone(Pipeline(list(steps.items()))).set_params(model__alpha=alpha)

        return make_model

    def test_is_kernel_ridge_on_the_dense_updates(self, make_model, zoo, rng):
        y = rng.normal(size=(60, 2))
        entries = DenseProduct().fit_transform(zoo)
        train, test = slice(0, 45), slice(45, 60)
        found = make_model("regression").fit(zoo[train], y[train]).predict(zoo[test])
        # An intercept that is not penalised is the same as centred features and targets.
        unit = entries / np.linalg.norm(entries, axis=1, keepdims=True)
        mean = unit[train].mean(axis=0)
        ridge = KernelRidge(alpha=0.1).fit(unit[train] - mean, y[train] - y[train].mean(axis=0))
        expected = ridge.predict(unit[test] - mean) + y[train].mean(axis=0)
        np.testing.assert_allclose(found, expected, atol=1e-9)

    @pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
    def test_kinds_of_classes(self, make_model, zoo, targets, labels, kind):
        y = {
            "binary": np.array(["no", "yes"])[labels],
            "multiclass": np.arange(60) % 3,
            "multilabel": targets["classification"],
        }[kind]
        model = make_model("classification").fit(zoo, y)
        assert model.predict(zoo).shape == y.shape
        assert set(np.unique(model.predict(zoo))) <= set(np.unique(y))
        assert model.decision_function(zoo).shape[0] == 60
        assert 0 <= model.score(zoo, y) <= 1

    @pytest.mark.parametrize(
        ("dtype", "condition", "rtol"), [(np.float64, 1e4, 1e-7), (np.float32, 1e2, 1e-4)]
    )
    def test_is_invariant_to_gl(
        self, make_model, rng, random_loras, labels, dtype, condition, rtol
    ):
        # Lengths lose the square of the condition, as those of linalg do.
        X = random_loras(rng, n_adapters=60, shapes=SHAPES, rank=2, dtype=dtype)
        model = make_model("classification").fit(X, labels)
        assert_gauge_invariant(model, X, condition=condition, rtol=rtol, random_state=1)

    def test_takes_other_ranks_and_is_pickled(self, make_model, zoo, labels, rng, random_loras):
        model = make_model("classification").fit(zoo, labels)
        other = random_loras(rng, n_adapters=7, shapes=SHAPES, rank=4)
        expected = model.decision_function(other)
        copy = pickle.loads(pickle.dumps(model))
        np.testing.assert_array_equal(copy.decision_function(other), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "model",
    [make_architecture("svd", random_state=0), GLNetClassifier(spectrum=True, random_state=0)],
    ids=["svd", "gl-net"],
)
def test_pruned_directions_are_no_features(rng, model, dtype):
    """AdaLoRA leaves columns of zeros anywhere; adapters may come that kept a direction more."""

    def zoo(n_kept):
        adapters = []
        for _ in range(40):
            U, V = rng.normal(size=(16, 6)), rng.normal(size=(12, 6))
            V[:, rng.permutation(6)[n_kept:]] = 0
            adapters.append({"q": (U.astype(dtype), V.astype(dtype))})
        return LoRACollection.from_factors(adapters)

    model = clone(model).fit(zoo(4), np.arange(40) % 2)
    assert_gauge_invariant(model, zoo(4), method="decision_function", random_state=0)
    scores = [np.abs(model.decision_function(zoo(n_kept))).max() for n_kept in (4, 5)]
    assert scores[1] < 100 * scores[0]
