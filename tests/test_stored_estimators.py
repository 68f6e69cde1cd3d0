"""Estimators in files of any kind: the same answers, plain state, and the version in it."""

import copy
import io
import os
import pickle
import subprocess
import sys
from functools import partial

import joblib
import numpy as np
import pytest
import sklearn
import skops.io
from sklearn.base import BaseEstimator, clone
from sklearn.pipeline import make_pipeline

import sklora
from sklora import ARCHITECTURES, TRUSTED_TYPES, architecture_grid, make_architecture
from sklora._base import VersionWarning
from tests.stored import TARGETS, answers_of, assert_same_answers, by_joblib, by_skops, fitted

STORES = [pytest.param(by_skops, id="skops"), pytest.param(by_joblib, id="joblib")]


@pytest.fixture
def loras(rng, random_loras):
    return random_loras(rng, 12, base_model="tiny")


@pytest.fixture
def make_model(loras):
    return partial(fitted, loras)


TRANSFORMERS = [
    sklora.DenseProduct(),
    sklora.DenseProduct("gram"),
    sklora.DenseProduct("sketch", 3, random_state=0),
    sklora.GLEquivariantProjection(2, random_state=0),
    sklora.GLEquivariantProjection(2, "hosvd"),
    sklora.OAlign(random_state=0),
    sklora.SVDSpectrum(),
    sklora.UpdateKernel(),
    sklora.UpdateKernel("cosine"),
    sklora.UpdateKernel("rbf"),
]
CLASSIFIERS = (sklora.GLNetClassifier, sklora.MLPNetClassifier)
REGRESSORS = (sklora.GLNetRegressor, sklora.MLPNetRegressor)
NETS = [
    (estimator, kind)
    for kind, (task, _) in TARGETS.items()
    for estimator in (CLASSIFIERS if task == "classification" else REGRESSORS)
]


def fitted_net(estimator, kind, X, partial=False):
    model = estimator(max_epochs=1, hidden_dim=4, random_state=0, device="cpu")
    y = TARGETS[kind][1](len(X))
    if not partial:
        return model.fit(X, y)
    classes = {"classes": np.unique(y)} if kind in ("binary", "multiclass") else {}
    return model.partial_fit(X, y, **classes)


def grid_pipelines(task):
    """Every entry of `architecture_grid`, each at the first of its values."""
    for entry in architecture_grid(task, device="cpu", random_state=0):
        model = make_architecture("mlp", task).set_params(**{k: v[0] for k, v in entry.items()})
        if "model__alpha" not in entry:
            model.set_params(model__max_epochs=1)
        yield model


def leaves(value):
    """All that a fitted state holds, with that of containers and of sklora's estimators."""
    if isinstance(value, sklora._base.VersionedState):
        value = value.__getstate__()
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


@pytest.mark.parametrize("store", STORES)
class TestEveryEstimator:
    @pytest.mark.parametrize("estimator", TRANSFORMERS, ids=repr)
    def test_transformers(self, loras, estimator, store):
        model = clone(estimator).fit(loras)
        loaded = store(model)
        assert_same_answers(loaded, model, loras)
        assert loaded.layout_ == model.layout_
        assert repr(loaded) == repr(model)

    @pytest.mark.parametrize("partial", [False, True], ids=["fit", "partial_fit"])
    @pytest.mark.parametrize(("estimator", "kind"), NETS)
    def test_nets(self, loras, estimator, kind, partial, store):
        model = fitted_net(estimator, kind, loras, partial)
        loaded = store(model)
        assert_same_answers(loaded, model, loras)
        if partial:  # goes on as if it had never been stored, optimizer and all
            y = TARGETS[kind][1](len(loras))
            assert_same_answers(loaded.partial_fit(loras, y), model.partial_fit(loras, y), loras)

    @pytest.mark.parametrize("task", ["classification", "regression"])
    @pytest.mark.parametrize("entry", range(len(ARCHITECTURES) + 1))
    def test_entries_of_the_grid(self, loras, task, entry, store):
        kind = {"classification": "multiclass", "regression": "two numbers"}[task]
        model = [*grid_pipelines(task)][entry].fit(loras, TARGETS[kind][1](len(loras)))
        assert_same_answers(store(model), model, loras)

    def test_unfitted(self, store):
        for estimator in [*TRANSFORMERS, *(estimator() for estimator, _ in NETS)]:
            assert repr(store(estimator)) == repr(estimator)

    def test_settings_of_scikit_learn(self, loras, store):
        with sklearn.config_context(enable_metadata_routing=True):
            net = sklora.GLNetClassifier(max_epochs=1, device="cpu")
            net.set_fit_request(sample_weight=True).set_score_request(sample_weight="weight")
            spectrum = sklora.SVDSpectrum().set_output(transform="pandas")
            model = make_pipeline(spectrum, sklora.MLPNetClassifier(max_epochs=1, device="cpu"))
            model.fit(loras, np.arange(12) % 2)
            wanted = "{'sample_weight': True}", "{'sample_weight': 'weight'}"
            for twin in (store(net), copy.deepcopy(store(net)), clone(store(net))):
                routing = twin.get_metadata_routing()
                assert (str(routing.fit), str(routing.score)) == wanted
            columns = store(model)[0].transform(loras).columns
            assert [*columns] == [*spectrum.get_feature_names_out()]


def test_every_public_estimator_is_stored():
    public = {getattr(sklora, name) for name in sklora.__all__}
    public = {one for one in public if isinstance(one, type) and issubclass(one, BaseEstimator)}
    assert public == {*map(type, TRANSFORMERS), *CLASSIFIERS, *REGRESSORS}


def test_fitted_state_is_arrays_numbers_and_strings(loras):
    models = [
        *(clone(estimator).fit(loras) for estimator in TRANSFORMERS),
        *(fitted_net(estimator, kind, loras, True) for estimator, kind in NETS),
    ]
    plain = (np.ndarray, np.generic, int, float, str, type(None), sklora.LoRALayout)
    for model in models:
        for value in leaves(model):
            assert isinstance(value, plain), type(value)
            assert not isinstance(value, np.ndarray) or value.dtype.kind != "O"


def test_same_answers_in_another_process(loras, tmp_path):
    models = [clone(estimator).fit(loras) for estimator in TRANSFORMERS]
    models += [fitted_net(estimator, kind, loras) for estimator, kind in NETS]
    for task, kind in (("classification", "binary"), ("regression", "one number")):
        y = TARGETS[kind][1](len(loras))
        models += [model.fit(loras, y) for model in grid_pipelines(task)]
    loras.save(tmp_path / "zoo.safetensors")
    stored = [*map(skops.io.dumps, models)], [*map(pickle.dumps, models)]
    joblib.dump(stored, tmp_path / "models.joblib")
    script = (
        "import joblib, pickle, skops.io, sys, sklora\n"
        "by_skops, by_pickle = joblib.load(sys.argv[1])\n"
        "models = [skops.io.loads(m, sklora.TRUSTED_TYPES) for m in by_skops]\n"
        "models += map(pickle.loads, by_pickle)\n"
        "X = sklora.LoRACollection.open(sys.argv[2])\n"
        "methods = ('transform', 'predict', 'predict_proba', 'decision_function')\n"
        "answers = [{n: getattr(m, n)(X) for n in methods if hasattr(m, n)} for m in models]\n"
        "joblib.dump(answers, sys.argv[3])"
    )
    names = ("models.joblib", "zoo.safetensors", "answers.joblib")
    arguments = [str(tmp_path / name) for name in names]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    for model, answers in zip(models * 2, joblib.load(arguments[2]), strict=True):
        expected = answers_of(model, loras)
        assert answers.keys() == expected.keys()
        for name, answer in answers.items():
            np.testing.assert_array_equal(answer, expected[name])


@pytest.mark.gpu
def test_files_move_between_cuda_and_cpu(cuda, loras, tmp_path):
    y = TARGETS["multiclass"][1](len(loras))
    models = [
        make_architecture(name, random_state=0, device="auto").set_params(model__max_epochs=1)
        for name in ARCHITECTURES
    ]
    models = [model.fit(loras, y) for model in models]
    there = [model.predict_proba(loras) for model in models]
    joblib.dump((models, loras, y), tmp_path / "models.joblib")
    script = (
        "import joblib, sys, torch\n"
        "assert not torch.cuda.is_available()\n"
        "models, X, y = joblib.load(sys.argv[1])\n"
        "answers = [model.predict_proba(X) for model in models]\n"
        "joblib.dump(([model.fit(X, y) for model in models], answers), sys.argv[1])"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "models.joblib")]
    subprocess.run(arguments, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    back, here = joblib.load(tmp_path / "models.joblib")
    for one, other, model in zip(there, here, back, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
        assert model.predict(loras).shape == (12,)


class TestVersion:
    """Of the sklora that stored an estimator, in whatever file."""

    OTHER = f"{sklora.__version__.partition('.')[0]}.999.7"  # another minor version

    @pytest.fixture
    def stored_by_other(self, monkeypatch):
        """Store by a sklora of another version, and give a function that loads."""

        def store(model, how):
            with monkeypatch.context() as patch:
                patch.setattr(sklora, "__version__", self.OTHER)
                data = skops.io.dumps(model) if how == "skops" else pickle.dumps(model)
                if how == "joblib":
                    buffer = io.BytesIO()
                    joblib.dump(model, buffer)
            if how == "skops":
                return lambda: skops.io.loads(data, trusted=TRUSTED_TYPES)
            if how == "joblib":
                return lambda: joblib.load(io.BytesIO(buffer.getvalue()))
            return lambda: pickle.loads(data)

        return store

    @pytest.mark.parametrize("how", ["skops", "joblib", "pickle"])
    def test_other_minor_version_warns_once_per_estimator(
        self, make_model, stored_by_other, loras, how
    ):
        model = make_model()
        load = stored_by_other(model, how)
        with pytest.warns(VersionWarning) as caught:
            loaded = load()
        messages = sorted(str(warning.message) for warning in caught)
        assert messages == [
            f"{name}, fitted on {what}, was stored by sklora '{self.OTHER}', and this is "
            f"{sklora.__version__}; if predictions differ, fit again."
            for name, what in (
                ("MLPNetClassifier", f"rows of {model['model'].n_features_in_} columns"),
                ("SVDSpectrum", "base model 'tiny', 3 modules"),
            )
        ]
        assert_same_answers(loaded, model, loras)

    def test_unfitted(self, stored_by_other):
        load = stored_by_other(sklora.OAlign(), "pickle")
        with pytest.warns(VersionWarning, match=f"^OAlign was stored by sklora '{self.OTHER}'"):
            load()

    def test_none_at_all(self):
        state = sklora.OAlign().__getstate__()
        del state["_sklora_version"]
        with pytest.warns(VersionWarning, match="stored by sklora 'unknown'"):
            sklora.OAlign().__setstate__(state)

    @pytest.mark.parametrize("version", [None, 7, ["0", "1"], "x" * 10**6])
    def test_odd_versions(self, version):
        state = {**sklora.OAlign().__getstate__(), "_sklora_version": version}
        with pytest.warns(VersionWarning) as caught:
            sklora.OAlign().__setstate__(state)
        assert len(str(caught[0].message)) < 200
        assert caught[0].filename == __file__
        assert state["_sklora_version"] == version

    def test_other_patch_is_silent(self, monkeypatch):
        data = pickle.dumps(sklora.OAlign())
        monkeypatch.setattr(sklora, "__version__", f"{sklora.__version__}.post1")
        pickle.loads(data)

    def test_is_no_attribute(self, loras):
        model = sklora.SVDSpectrum().fit(loras)
        for twin in (by_joblib(model), by_skops(model), copy.copy(model), copy.deepcopy(model)):
            assert vars(twin).keys() == vars(model).keys()
