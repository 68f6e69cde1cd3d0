import json
import os
import sys

import numpy as np
import pytest
import skops.io
import torch
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from skorch.callbacks import EpochScoring

from sklora import (
    ARCHITECTURES,
    TRUSTED_TYPES,
    LoRACollection,
    LoRALayout,
    architecture_grid,
    make_architecture,
)
from sklora.__main__ import main
from sklora._saved import columns_of, read_model
from sklora.deployment import load_model, save_model
from sklora.estimators import MLPNetRegressor
from sklora.io import read_adapters, write_adapter
from sklora.transform import GLEquivariantProjection, SVDSpectrum
from tests.stored import TARGETS, assert_same_answers, fitted


@pytest.fixture
def X(rng, random_loras):
    return random_loras(rng, 12, base_model="tiny")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.skops"


def names_for(kind):
    return ["first", "second"] if kind in ("multilabel", "two numbers") else "first"


class TestSaveAndLoad:
    @pytest.mark.parametrize(
        ("architecture", "kind"),
        [(name, "multiclass") for name in ARCHITECTURES if name != "svd"]
        + [(name, kind) for name in ("svd", "kernel") for kind in TARGETS],
    )
    def test_answers_are_those_of_the_model(self, X, path, architecture, kind):
        model = fitted(X, architecture, kind)
        save_model(model, path, X, targets=names_for(kind))
        loaded = load_model(path)
        assert_same_answers(loaded, model, X)
        assert_same_answers(skops.io.load(path, trusted=TRUSTED_TYPES), model, X)
        card = read_model(path)[1]
        assert card.architecture == {"kernel": "dense"}.get(architecture, architecture)
        assert card.probabilities == hasattr(model, "predict_proba")
        assert card.task == TARGETS[kind][0]
        assert card.targets == tuple(np.atleast_1d(names_for(kind)))
        assert card.layout == X.layout
        assert card.n_adapters == 12

    @pytest.mark.parametrize("net", ["mlp", "gl-net"])
    def test_projected_factors(self, X, path, net):
        model = make_architecture(net, device="cpu", random_state=0)
        model.set_params(features=GLEquivariantProjection(2, device="cpu"), model__max_epochs=1)
        model.fit(X, np.arange(12) % 2)
        save_model(model, path, X, targets="kind")
        assert_same_answers(load_model(path), model, X)
        assert read_model(path)[1].architecture == net

    def test_best_estimator_of_a_search(self, X, path):
        grid = architecture_grid(random_state=0)[:2]
        search = GridSearchCV(make_architecture("mlp"), grid, cv=2)
        search.estimator.set_params(model__max_epochs=1)
        search.fit(X, np.array(["a", "b"])[np.arange(12) % 2])
        save_model(search.best_estimator_, path, X, targets="style")
        assert_same_answers(load_model(path), search.best_estimator_, X)

    def test_the_model_is_as_it_was(self, X, path, tmp_path):
        model = fitted(X).set_params(features__n_jobs=2, memory=str(tmp_path / "cache"))
        save_model(model, path, X, targets="kind")
        assert model["features"].n_jobs == 2
        assert model.memory == str(tmp_path / "cache")
        loaded = load_model(path)
        assert loaded["features"].n_jobs is None
        assert loaded.memory is None
        assert_same_answers(loaded, model, X)

    def test_classes_of_numpys_type_of_text(self, X, path):
        """As `pandas.Series` of a list of them has them."""
        classes = np.array([np.str_("a"), np.str_("b")], dtype=object)
        model = make_architecture("svd", device="cpu").set_params(model__max_epochs=1)
        model.fit(X, classes[np.arange(12) % 2])
        assert type(model.classes_[0]) is np.str_
        save_model(model, path, X, targets="kind")
        assert_same_answers(load_model(path), model, X)
        assert read_model(path)[1].classes == ("a", "b")

    def test_link_stays_a_link(self, X, path):
        path.symlink_to("other.skops")
        save_model(fitted(X), path, X, targets="kind")
        assert path.is_symlink()
        load_model(path.parent / "other.skops")

    def test_which_modules_an_adapter_may_lack(self, rng, path):
        pairs = [(rng.normal(size=(4, 2)), rng.normal(size=(3, 2))) for _ in range(12)]
        adapters = [dict.fromkeys(["q", "k"][: 1 + row % 2], pairs[row]) for row in range(12)]
        X = LoRACollection.from_factors(
            adapters, layout=LoRALayout([("q", 4, 3, 2), ("k", 4, 3, 2)])
        )
        save_model(fitted(X), path, X, targets="kind")
        assert read_model(path)[1].optional == ("k",)


class TestCommandLine:
    def test_predicts(self, X, path, tmp_path, capsys):
        """Of the same files, the command says what the pipeline says."""
        for row in range(len(X)):
            write_adapter(tmp_path / f"{row:02}", X[row])
        files = read_adapters(tmp_path)
        model = fitted(files, "svd", "multiclass")
        save_model(model, path, files, targets="kind")
        assert main(["predict", str(path), str(tmp_path / "*")]) == 0
        header, *rows = [line.split(",") for line in capsys.readouterr().out.splitlines()]
        assert header == ["path", "prediction", *(f"{one}:probability" for one in "abc"), "error"]
        assert [row[1] for row in rows] == model.predict(files).tolist()
        shares = np.array([row[2:5] for row in rows], float)
        np.testing.assert_allclose(shares, model.predict_proba(files), rtol=1e-6)

    @pytest.mark.parametrize("kind", ["multiclass", "multilabel", "two numbers"])
    def test_predicts_by_the_kernel_route(self, X, path, tmp_path, capsys, kind):
        """Without probabilities, which it has not."""
        for row in range(len(X)):
            write_adapter(tmp_path / f"{row:02}", X[row])
        files = read_adapters(tmp_path)
        model = fitted(files, "kernel", kind)
        save_model(model, path, files, targets=names_for(kind))
        assert main(["predict", str(path), str(tmp_path / "*")]) == 0
        header, *rows = [line.split(",") for line in capsys.readouterr().out.splitlines()]
        names = ["prediction"] if kind == "multiclass" else names_for(kind)
        assert header == ["path", *names, "error"]
        expected = model.predict(files)
        values = np.array([row[1:-1] for row in rows], expected.dtype).reshape(expected.shape)
        if kind == "two numbers":
            np.testing.assert_allclose(values, expected, rtol=1e-9)
        else:
            np.testing.assert_array_equal(values, expected)
        assert main(["predict", "--json", str(path), str(tmp_path / "00")]) == 0
        [entry] = json.loads(capsys.readouterr().out)
        first = expected[0].tolist()
        if kind != "multiclass":
            first = dict(zip(names, first, strict=True))
        assert entry.keys() == {"path", "prediction"}
        assert entry["prediction"] == (pytest.approx(first) if kind == "two numbers" else first)


class TestRefuses:
    def refusal(self, model, path, X, targets="kind", kind=ValueError) -> str:
        with pytest.raises(kind) as error:
            save_model(model, path, X, targets=targets)
        assert not path.is_file()
        return str(error.value)

    @pytest.mark.parametrize(
        "model",
        [
            SVDSpectrum(),
            make_pipeline(SVDSpectrum(), MLPNetRegressor()),
            Pipeline([("features", SVDSpectrum()), ("more", "passthrough"), ("model", Ridge())]),
            GridSearchCV(make_architecture("svd"), {}),
        ],
        ids=lambda model: type(model).__name__,
    )
    def test_other_estimators(self, X, path, model):
        message = self.refusal(model, path, X)
        assert "model is of type " in message
        assert "make_architecture, or best_estimator_" in message

    def test_other_steps(self, X, path):
        ridge = make_architecture("svd").set_params(model=Ridge()).fit(X, np.arange(12.0))
        message = self.refusal(ridge, path, X)
        assert "'model' of model is of type Ridge" in message
        assert "skops.io.dump" in message
        ridge.set_params(features=PCA(2)).fit(X, np.arange(12.0))
        assert "'features' of model is of type PCA" in self.refusal(ridge, path, X)

    @pytest.mark.parametrize(
        "changes",
        [
            {"features__span__kernel": "linear"},
            {"features__span": PCA(2)},
            {"features__kernel": SVDSpectrum()},
            {"model": MLPNetRegressor(max_epochs=1)},
        ],
        ids=str,
    )
    def test_other_kernel_routes(self, X, path, changes):
        model = fitted(X, "kernel", "one number").set_params(**changes)
        assert "the kernel route of architecture_grid" in self.refusal(model, path, X)

    def test_a_model_that_is_not_fitted(self, X, path):
        self.refusal(make_architecture("svd"), path, X, kind=NotFittedError)

    @pytest.mark.parametrize(
        ("kind", "targets", "number"),
        [
            ("multiclass", ["a", "b", "c"], "1 value"),
            ("multilabel", "a", "2 values"),
            ("multilabel", ["a", "b", "c"], "2 values"),
            ("two numbers", ["a"], "2 values"),
            ("one number", [], "1 value"),
            ("one number", [1], "1 value"),
        ],
    )
    def test_targets(self, X, path, kind, targets, number):
        message = self.refusal(fitted(X, "svd", kind), path, X, targets)
        assert f"model predicts {number} of each adapter" in message

    @pytest.mark.parametrize("targets", [["a", "a"], ["path", "b"]])
    def test_columns_of_one_name(self, X, path, targets):
        message = self.refusal(fitted(X, "svd", "two numbers"), path, X, targets)
        assert f"two columns '{targets[0]}'" in message

    @pytest.mark.timeout(60)
    def test_very_many_columns(self):
        assert len(columns_of([*map(str, range(10**6))], None, False)) == 10**6 + 2

    @pytest.mark.parametrize("classes", [[False, True], [1.0, 2.0]])
    def test_classes_that_json_does_not_tell_apart(self, X, path, classes):
        model = make_architecture("svd", device="cpu").set_params(model__max_epochs=1)
        model.fit(X, np.array(classes)[np.arange(12) % 2])
        message = self.refusal(model, path, X)
        assert f"classes {classes}" in message
        assert "integers or text" in message

    def test_adapters_of_other_modules(self, X, path, rng, random_loras):
        other = random_loras(rng, 12, shapes=[(3, 2)])
        assert "(3, 2), but (" in self.refusal(fitted(X), path, other)
        assert "pass the LoRACollection" in self.refusal(fitted(X), path, X.read())

    def test_a_model_of_plain_rows(self, X, path, rng):
        rows = rng.normal(size=(12, 5))
        plain = LoRACollection.from_array(rows, LoRALayout.rows(5))
        assert "plain rows" in self.refusal(fitted(plain), path, plain)

    def test_callbacks(self, X, path):
        model = fitted(X).set_params(model__callbacks=[EpochScoring("accuracy")])
        message = self.refusal(model, path, X)
        assert message.startswith("model has no place in a model file: it holds types that are not")
        assert "skorch.callbacks.scoring.EpochScoring" in message

    @pytest.mark.parametrize(
        ("name", "value"),
        [("random_state", np.random.RandomState(0)), ("device", torch.device("cpu"))],
    )
    def test_parameters_that_are_objects(self, X, path, name, value):
        model = fitted(X).set_params(**{f"model__{name}": value})
        assert "a RandomState or a torch.device, by set_params" in self.refusal(model, path, X)

    def test_a_model_that_does_not_answer(self, X, path):
        model = fitted(X)
        model["model"].weights_ = {}
        assert "its pipeline is not what" in self.refusal(model, path, X)

    def test_without_skops(self, X, path, monkeypatch):
        model = fitted(X)
        monkeypatch.setitem(sys.modules, "skops.io", None)
        assert "sklora[secure]" in self.refusal(model, path, X, kind=ModuleNotFoundError)

    def test_a_folder(self, X, tmp_path):
        assert "is a folder" in self.refusal(fitted(X), tmp_path, X)

    def test_no_folder(self, X, tmp_path):
        self.refusal(fitted(X), tmp_path / "none" / "m.skops", X, kind=FileNotFoundError)

    def test_what_was_there_stays(self, X, path):
        path.write_text("mine")
        model = fitted(X).set_params(model__callbacks=[EpochScoring("accuracy")])
        with pytest.raises(ValueError, match="no place"):
            save_model(model, path, X, targets="kind")
        assert path.read_text() == "mine"
        assert os.listdir(path.parent) == [path.name]


class TestLoadRefuses:
    def test_no_model(self, path):
        path.write_bytes(b"PK\x03\x04")
        with pytest.raises(ValueError, match=r"model\.skops is damaged, or no model that sklora"):
            load_model(path)

    def test_a_pipeline_that_skops_stored(self, X, path):
        skops.io.dump(fitted(X), path)
        with pytest.raises(ValueError, match=r"it has no sklora\.json"):
            load_model(path)

    def test_no_file(self, path):
        with pytest.raises(FileNotFoundError):
            load_model(path)

    def test_pipe(self):
        reader, writer = os.pipe()
        os.close(writer)
        with pytest.raises(ValueError, match="it is a pipe; name a file"):
            load_model(f"/dev/fd/{reader}")
        os.close(reader)
