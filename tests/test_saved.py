import copy
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import joblib
import numpy as np
import pytest
import sklearn
import skops.io
from sklearn.base import BaseEstimator, clone
from sklearn.decomposition import PCA
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline

import sklora
from sklora import ARCHITECTURES, TRUSTED_TYPES, architecture_grid, make_architecture
from sklora._base import VersionWarning
from sklora._saved import CARD, ModelCard, layout_of, load_model, save_model
from sklora.io._plan import ReadOptions

TARGETS = {
    "binary": ("classification", lambda n: np.arange(n) % 2),
    "multiclass": ("classification", lambda n: np.array(["a", "b", "c"])[np.arange(n) % 3]),
    "multilabel": ("classification", lambda n: np.stack([np.arange(n) % 2, np.arange(n) // 6], 1)),
    "one number": ("regression", lambda n: np.linspace(0, 1, n)),
    "two numbers": ("regression", lambda n: np.linspace(0, 1, 2 * n).reshape(n, 2)),
}


@pytest.fixture
def loras(rng, random_loras):
    return random_loras(rng, 12, base_model="tiny")


@pytest.fixture
def make_model(loras):
    """Fit for an epoch: a function of architecture and kind of target."""

    def make_model(architecture="svd", kind="multiclass"):
        task, targets = TARGETS[kind]
        model = make_architecture(architecture, task, random_state=0, device="cpu")
        return model.set_params(model__max_epochs=1).fit(loras, targets(len(loras)))

    return make_model


def card_of(model, kind="multiclass", **changes) -> ModelCard:
    classes = model["model"].classes_ if TARGETS[kind][0] == "classification" else ()
    options = {
        "task": TARGETS[kind][0],
        "targets": ("first", "second") if kind in ("multilabel", "two numbers") else ("first",),
        "classes": tuple(classes.tolist()) if kind in ("binary", "multiclass") else None,
        "architecture": "svd",
        "layout": layout_of(model),
        "optional": (),
        "reading": ReadOptions(keys=("a_{module}", "b_{module}"), scale=2.0),
        "n_adapters": 12,
        "scores": {"metric": "accuracy", "scores": {"svd": [0.5, 0.75]}},
    }
    return ModelCard(**{**options, **changes})


def members_of(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def by_skops(model):
    return skops.io.loads(skops.io.dumps(model), trusted=TRUSTED_TYPES)


def by_joblib(model):
    buffer = io.BytesIO()
    joblib.dump(model, buffer)
    buffer.seek(0)
    return joblib.load(buffer)


STORES = [pytest.param(by_skops, id="skops"), pytest.param(by_joblib, id="joblib")]


def answers_of(model, X):
    methods = ("transform", "predict", "predict_proba", "decision_function")
    return {name: getattr(model, name)(X) for name in methods if hasattr(model, name)}


def assert_same_answers(one, other, X):
    """To the bit."""
    answers, expected = answers_of(one, X), answers_of(other, X)
    assert answers.keys() == expected.keys()
    assert answers
    for name, answer in answers.items():
        np.testing.assert_array_equal(answer, expected[name])


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
    for task, kind in (("classification", "binary"), ("regression", "one number")):
        y = TARGETS[kind][1](len(loras))
        models += [model.fit(loras, y) for model in grid_pipelines(task)]
    joblib.dump((models, loras), tmp_path / "models.joblib")
    script = (
        "import joblib, sys\n"
        "models, X = joblib.load(sys.argv[1])\n"
        "methods = ('transform', 'predict', 'predict_proba', 'decision_function')\n"
        "answers = [{n: getattr(m, n)(X) for n in methods if hasattr(m, n)} for m in models]\n"
        "joblib.dump(answers, sys.argv[2])"
    )
    arguments = [str(tmp_path / "models.joblib"), str(tmp_path / "answers.joblib")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    for model, answers in zip(models, joblib.load(arguments[1]), strict=True):
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
    joblib.dump((models, loras), tmp_path / "models.joblib")
    script = (
        "import joblib, sys, torch\n"
        "assert not torch.cuda.is_available()\n"
        "models, X = joblib.load(sys.argv[1])\n"
        "answers = [model.predict_proba(X) for model in models]\n"
        "joblib.dump(([model.fit(X, model.predict(X)) for model in models], answers), sys.argv[1])"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "models.joblib")]
    subprocess.run(arguments, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    back, here = joblib.load(tmp_path / "models.joblib")
    for one, other, model in zip(there, here, back, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
        assert model.predict(loras).shape == (12,)


class TestVersion:
    """Of the sklora that stored an estimator, in whatever file."""

    OTHER = "9.8.7"

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
        with pytest.warns(VersionWarning, match=r"^OAlign was stored by sklora '9\.8\.7', and"):
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

    def test_other_patch_is_silent(self, monkeypatch):
        data = pickle.dumps(sklora.OAlign())
        monkeypatch.setattr(sklora, "__version__", f"{sklora.__version__}.post1")
        pickle.loads(data)

    def test_is_no_attribute(self, loras):
        model = sklora.SVDSpectrum().fit(loras)
        for twin in (by_joblib(model), by_skops(model), copy.copy(model), copy.deepcopy(model)):
            assert vars(twin).keys() == vars(model).keys()


class TestRoundTrip:
    @pytest.mark.parametrize("kind", TARGETS)
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_same_predictions(self, tmp_path, make_model, loras, architecture, kind):
        model = make_model(architecture, kind)
        card = card_of(model, kind, architecture=architecture)
        save_model(tmp_path / "m.skops", model, card)
        loaded, loaded_card = load_model(tmp_path / "m.skops")
        assert loaded_card == card
        plain = skops.io.load(tmp_path / "m.skops", trusted=TRUSTED_TYPES)
        for other in (loaded, plain, by_joblib(model)):
            assert_same_answers(other, model, loras)

    def test_no_other_type_needs_trust(self, make_model):
        types = skops.io.get_untrusted_types(data=skops.io.dumps(make_model("o-align")))
        assert set(types) < set(TRUSTED_TYPES)
        assert all(name.startswith("sklora.") for name in TRUSTED_TYPES)


class TestFile:
    def test_card_is_readable_json(self, tmp_path, make_model):
        model = make_model()
        save_model(tmp_path / "m.skops", model, card_of(model))
        card = json.loads(members_of(tmp_path / "m.skops")[CARD])
        assert card["sklora"] == sklora.__version__
        assert card["classes"] == ["a", "b", "c"]
        assert card["layout"]["base_model"] == "tiny"
        assert card["reading"]["scale"] == 2.0

    def test_replaces_and_leaves_nothing_behind(self, tmp_path, make_model):
        model = make_model()
        for _ in range(2):
            save_model(tmp_path / "m.skops", model, card_of(model))
        assert os.listdir(tmp_path) == ["m.skops"]

    def test_other_minor_version_warns(self, tmp_path, make_model):
        model = make_model()
        save_model(tmp_path / "m.skops", model, card_of(model, sklora="0.9.1"))
        with pytest.warns(
            VersionWarning, match=r"m\.skops was stored by sklora '0\.9\.1', and this is 0\.1"
        ):
            load_model(tmp_path / "m.skops")

    def test_other_patch_does_not(self, tmp_path, make_model):
        model = make_model()
        save_model(tmp_path / "m.skops", model, card_of(model, sklora=f"{sklora.__version__}.9"))
        load_model(tmp_path / "m.skops")


class TestHostile:
    @pytest.fixture
    def good(self, tmp_path, make_model):
        model = make_model()
        save_model(tmp_path / "m.skops", model, card_of(model))
        return tmp_path / "m.skops"

    def refusal(self, path) -> str:
        with pytest.raises(ValueError, match="no model") as error:
            load_model(path)
        assert str(path) in str(error.value)
        return str(error.value)

    @pytest.mark.parametrize("data", [b"", b"PK", b"PK\x03\x04", b"nothing", b"\x80\x04K\x01."])
    def test_no_zip(self, tmp_path, data):
        (tmp_path / "m.skops").write_bytes(data)
        self.refusal(tmp_path / "m.skops")

    @pytest.mark.parametrize("name", [CARD, "schema.json"])
    def test_missing_member(self, good, name):
        members = members_of(good)
        del members[name]
        write_zip(good, members)
        assert f"it has no {name}" in self.refusal(good)

    def test_plain_skops_file(self, tmp_path, make_model):
        skops.io.dump(make_model(), tmp_path / "m.skops")
        assert CARD in self.refusal(tmp_path / "m.skops")

    def test_every_truncation(self, good):
        data = good.read_bytes()
        for size in range(0, len(data), len(data) // 40):
            good.write_bytes(data[:size])
            self.refusal(good)

    def test_missing_array(self, good):
        members = members_of(good)
        del members[next(name for name in members if name.endswith(".npy"))]
        write_zip(good, members)
        self.refusal(good)

    def test_bomb(self, good):
        write_zip(good, {**members_of(good), "x.npy": bytes(2**27)}, zipfile.ZIP_DEFLATED)
        assert good.stat().st_size < 2**21
        self.refusal(good)

    def test_large_card(self, good, monkeypatch):
        monkeypatch.setattr("sklora._saved._MAX_CARD", 100)
        assert "more than 100" in self.refusal(good)

    def test_card_too_large_to_write(self, tmp_path, make_model, monkeypatch):
        model = make_model()
        monkeypatch.setattr("sklora._saved._MAX_CARD", 100)
        with pytest.raises(ValueError, match="card has"):
            save_model(tmp_path / "m.skops", model, card_of(model))
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        "changes",
        [
            {"format": "other"},
            {"version": 2},
            {"sklora": 1},
            {"task": "clustering"},
            {"task": ["classification"]},
            {"targets": []},
            {"targets": "first"},
            {"targets": [1]},
            {"classes": ["a", 1, "c"]},
            {"classes": ["a", "b", "d"]},
            {"classes": []},
            {"classes": None, "targets": ["one", "two"]},
            {"architecture": "cnn"},
            {"architecture": {}},
            {"layout": []},
            {"layout": {"modules": [], "side": [], "base_model": None}},
            {"layout": {"modules": [["q", 1, 1]], "side": [], "base_model": None}},
            {"layout": {"modules": [["q", 8, 6, 2]], "side": [], "base_model": None}},
            {"layout": {"modules": [["q", 8, 6, 2]], "side": [], "base_model": 1}},
            {"optional": [1]},
            {"reading": None},
            {"reading": {}},
            {"reading": {**ReadOptions().__dict__, "names": "odd"}},
            {"reading": {**ReadOptions().__dict__, "keys": ["a", "b"]}},
            {"reading": {**ReadOptions().__dict__, "scale": "1"}},
            {"reading": {**ReadOptions().__dict__, "allow_torch_zip": 1}},
            {"reading": {**ReadOptions().__dict__, "more": 1}},
            {"n_adapters": 0},
            {"n_adapters": True},
            {"scores": 1},
        ],
        ids=str,
    )
    def test_forged_card(self, good, changes):
        members = members_of(good)
        card = {**json.loads(members[CARD]), **changes}
        write_zip(good, {**members, CARD: json.dumps(card)})
        self.refusal(good)

    @pytest.mark.parametrize("text", ["", "[]", "[" * 10**5, "{", "\xff", "null"])
    def test_card_is_no_json(self, good, text):
        write_zip(good, {**members_of(good), CARD: text.encode("latin-1")})
        self.refusal(good)

    @pytest.mark.parametrize("text", ["", "[]", "[" * 10**5, "{}", "null", '{"__class__": "a"}'])
    def test_schema_is_none(self, good, text):
        write_zip(good, {**members_of(good), "schema.json": text})
        self.refusal(good)

    def test_untrusted_types(self, good):
        members = members_of(good)
        schema = members["schema.json"].replace(b'"SVDSpectrum"', b'"Popen"')
        schema = schema.replace(b'"sklora.transform.spectrum"', b'"subprocess"')
        write_zip(good, {**members, "schema.json": schema})
        message = self.refusal(good)
        assert "types that are not sklora's: 'subprocess.Popen'; do not load it" in message

    def test_pipeline_of_other_steps(self, good, loras):
        other = make_pipeline(PCA(2), GaussianNB())
        other.fit(loras, np.array(["a", "b", "c"])[np.arange(12) % 3])
        self.swap(good, other)

    def test_pipeline_that_would_cache(self, good, make_model):
        self.swap(good, make_model().set_params(memory="/tmp"))

    @pytest.mark.parametrize("kind", ["binary", "one number", "multilabel"])
    def test_pipeline_of_other_targets(self, good, make_model, kind):
        self.swap(good, make_model(kind=kind))

    def test_pipeline_that_is_not_fitted(self, good):
        self.swap(good, make_architecture("svd"))

    @pytest.mark.parametrize("weight", ["missing", "of another shape"])
    def test_weights(self, good, make_model, weight):
        model = make_model()
        name = next(iter(model["model"].weights_))
        if weight == "missing":
            del model["model"].weights_[name]
        else:
            model["model"].weights_[name] = np.zeros((3, 3))
        self.swap(good, model)

    def swap(self, path, model):
        """Put another model under the card."""
        card = members_of(path)[CARD]
        buffer = io.BytesIO()
        skops.io.dump(model, buffer)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(CARD, card)
        path.write_bytes(buffer.getvalue())
        assert "its pipeline is not what sklora.json says" in self.refusal(path)
