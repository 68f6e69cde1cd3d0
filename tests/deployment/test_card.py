"""Cards say what a search found."""

from __future__ import annotations

import os
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import skops.io
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.tree import DecisionTreeClassifier

import sklora
from sklora import (
    GLNetClassifier,
    LoRACollection,
    LoRALayout,
    MLPNetClassifier,
    MLPNetRegressor,
    SVDSpectrum,
    architecture_grid,
    make_architecture,
)
from sklora.deployment import model_card
from sklora.io import write_adapter
from tests.deployment.zoo import SHAPES, make_zoo, targets


class TestModelCard:
    @pytest.fixture
    def zoo(self):
        return make_zoo(np.full((30, len(SHAPES)), 2), side=True)

    @pytest.fixture
    def search(self, zoo):
        grid = architecture_grid(device="cpu", random_state=0)
        for entry in grid[:-1]:
            entry["model"][0].set_params(max_epochs=1, hidden_dim=4)
        search = GridSearchCV(make_architecture("mlp"), grid, cv=GroupKFold(3))
        return search.fit(zoo, targets("binary", 30), groups=np.arange(30) // 3)

    def test_search_over_the_grid(self, search, zoo, tmp_path):
        figures = plt.get_fignums()
        card = model_card(search, tmp_path / "scores.png", targets=["style"])
        assert plt.get_fignums() == figures
        card.save(tmp_path / "README.md")
        text = (tmp_path / "README.md").read_text()
        assert "A classification model for LoRA adapters, which predicts 'style'" in text
        assert "base model 'tiny'. Classes: 'no', 'yes'." in text
        assert "5 modules, and 3 columns of side features" in text
        assert "3 folds, `cv=GroupKFold(n_splits=3" in text
        assert "![Comparison](scores.png)" in text
        assert "\n### Scores\n" in text
        assert "Model Plot" not in text
        assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
        modules = zip(*card.select("Modules").table.values(), strict=True)
        assert [*modules] == [*zoo.layout.modules]
        versions = card.select("Versions").table
        assert versions["version"][versions["package"].index("sklora")] == sklora.__version__

    def test_scores_are_those_of_the_search(self, search, tmp_path):
        card = model_card(search, tmp_path / "scores.png")
        scores = card.select("Model description/Evaluation Results/Scores").table
        names = ["mlp", "o-align", "svd", "dense", "gl-net", "dense (kernel)"]
        assert sorted(scores["architecture"]) == sorted(names)
        best = scores["architecture"][0]
        assert f"This model is {best!r}." in card.render()
        assert scores["mean"][0] == f"{search.best_score_:.3f}"
        assert scores["mean"] == sorted(scores["mean"], reverse=True)
        place = scores["architecture"].index("svd")
        results = search.cv_results_
        folds = [results[f"split{fold}_test_score"][names.index("svd")] for fold in range(3)]
        assert scores["standard deviation over folds"][place] == f"{np.std(folds, ddof=1):.3f}"
        fit_time = results["mean_fit_time"][names.index("svd")]
        assert scores["seconds for one fit"][place] == f"{fit_time:.2f}"

    @pytest.mark.parametrize(
        "model",
        [
            make_architecture("svd", device="cpu").set_params(model__max_epochs=1),
            make_architecture("mlp", device="cpu").set_params(model__max_epochs=1),
            GLNetClassifier(max_epochs=1, device="cpu"),
            Pipeline([("features", architecture_grid()[-1]["features"][0]), ("m", Ridge())]),
            make_pipeline(
                FeatureUnion([("pca", make_pipeline(PCA(2))), ("svd", SVDSpectrum(device="cpu"))]),
                MLPNetClassifier(max_epochs=1, device="cpu"),
            ),
        ],
        ids=["svd", "mlp", "no pipeline", "nested", "union"],
    )
    def test_code_of_the_card_runs(self, model, tmp_path, monkeypatch):
        ranks = np.full((30, len(SHAPES)), 2)
        ranks[:2, 3:] = 0  # as many an upload
        zoo = make_zoo(ranks)
        y = np.arange(30) % 2
        search = GridSearchCV(model, {}, cv=2).fit(zoo, y)
        text = model_card(search, tmp_path / "scores.png").render()
        assert "Other modules of an adapter are not read" in text
        assert "Classes: '" not in text  # but 0 and 1
        for name, adapter in zip("ab", zoo, strict=False):
            factors = {**adapter, "another.to_q": (np.ones((3, 1)), np.ones((2, 1)))}
            write_adapter(tmp_path / "adapters" / name, factors, base_model="tiny")
        store = text.split("Store the model with `")[1].split("`")[0]
        code = (
            text.split("```python\n")[1]
            .split("```")[0]
            .replace("model.predict", "y = model.predict")
        )
        monkeypatch.chdir(tmp_path)
        namespace = {"search": search, "skops": skops}
        exec(store, namespace)
        exec(code, namespace)
        np.testing.assert_allclose(namespace["y"], search.predict(zoo[:2]), rtol=1e-5)

    def test_labels_are_no_classes(self, zoo, tmp_path):
        model = GLNetClassifier(max_epochs=1, device="cpu")
        search = GridSearchCV(model, {}, cv=2).fit(zoo, targets("multilabel", 30))
        text = model_card(search, tmp_path / "scores.png").render()
        assert "A multilabel classification model" in text
        assert "Classes" not in text

    def test_labels_of_an_estimator_of_scikit_learn(self, zoo, tmp_path):
        model = make_pipeline(SVDSpectrum(device="cpu"), DecisionTreeClassifier())
        search = GridSearchCV(model, {}, cv=2).fit(zoo, targets("multilabel", 30)[:, :2])
        text = model_card(search, tmp_path / "scores.png", targets=["a", "b"]).render()
        assert "A multilabel classification model" in text
        assert "A classification model" in model_card(search, tmp_path / "scores.png").render()

    def test_classes_are_no_labels(self, zoo, tmp_path):
        model = make_pipeline(GLNetClassifier(max_epochs=1, device="cpu"))
        search = GridSearchCV(model, {}, cv=2).fit(zoo, targets("binary", 30))
        text = model_card(search, tmp_path / "scores.png", targets=["style", "content"]).render()
        assert "A classification model" in text
        assert "Classes: 'no', 'yes'." in text

    def test_one_name_of_a_target_is_no_sequence(self, search, tmp_path):
        with pytest.raises(ValueError, match=r"targets is 'style'; give a list, \['style'\]"):
            model_card(search, tmp_path / "scores.png", targets="style")
        assert os.listdir(tmp_path) == []

    def test_names_from_files_stay_in_their_line(self, zoo, tmp_path):
        layout = LoRALayout(zoo.layout.modules, side=zoo.layout.side, base_model="tiny\n\n# Safe")
        X = LoRACollection.from_array(np.asarray(zoo), layout)
        model = GLNetClassifier(max_epochs=1, device="cpu")
        search = GridSearchCV(model, {}, cv=2).fit(X, targets("binary", 30))
        text = model_card(search, tmp_path / "scores.png").render()
        assert "# Safe" not in text.splitlines()
        assert text.count(r"'tiny\n\n# Safe'") == 2

    def test_names_of_modules_hide_nothing(self, tmp_path):
        names = ["a\n# Safe", "\x1b[2J", "\u202egpj.exe"]
        layout = LoRALayout([(name, 3, 2, 1) for name in names])
        X = LoRACollection.from_array(np.random.default_rng(0).normal(size=(30, 15)), layout)
        model = GLNetClassifier(max_epochs=1, device="cpu")
        search = GridSearchCV(model, {}, cv=2).fit(X, targets("binary", 30))
        text = model_card(search, tmp_path / "scores.png").render()
        assert text.replace("\n", "").isprintable()
        assert "The adapters are of" not in text
        assert "Base model: not named." in text
        assert all(name in text for name in (r"a\n# Safe", r"\x1b&#91;2J", r"\u202egpj.exe"))

    def test_names_are_no_markup(self, tmp_path):
        factors = np.ones((30, 3, 1)) * np.arange(30)[:, None, None]
        X = LoRACollection.from_factors(
            ({"a|b": (U, U), "<img src=x>": (U, U)} for U in factors), base_model="<b>tiny</b>"
        )
        model = GLNetClassifier(
            max_epochs=1, device="cpu", layout=X.layout, class_weight={"*x*": 1, "<y>": 2}
        )
        search = GridSearchCV(model, {}, cv=2).fit(X, np.where(np.arange(30) % 2, "*x*", "<y>"))
        text = model_card(search, tmp_path / "my scores.png", targets=np.array(["`t`"])).render()
        assert "which predicts '&#96;t&#96;'." in text
        assert "Classes: '&#42;x&#42;', '&#60;y&#62;'." in text
        # With that of the parameter layout.
        assert text.count("'&#60;b&#62;tiny&#60;/b&#62;'") == 3
        assert "{'&#42;x&#42;': 1, '&#60;y&#62;': 2}" in text
        assert [line.count("|") for line in text.splitlines() if "&#124;" in line] == [5]
        assert not any(name in text for name in ("<img", "<b>", "<y>", "*x*"))
        assert "![Comparison](my%20scores.png)" in text

    def test_no_targets(self, search, tmp_path):
        text = model_card(search, tmp_path / "scores.png", targets=[]).render()
        assert "A classification model for LoRA adapters. The" in text

    def test_one_fold(self, zoo, tmp_path):
        model = GLNetClassifier(max_epochs=1, device="cpu")
        split = [(np.arange(20), np.arange(20, 30))]
        search = GridSearchCV(model, {}, cv=split).fit(zoo, targets("binary", 30))
        card = model_card(search, tmp_path / "scores.png")
        scores = card.select("Model description/Evaluation Results/Scores").table
        assert scores["standard deviation over folds"] == ["one fold"]
        assert "folds, of given splits." in card.render()

    def test_search_over_one_pipeline(self, zoo, tmp_path):
        model = make_architecture("gl-net", "regression", device="cpu", random_state=0)
        search = GridSearchCV(model, {"model__max_epochs": [1, 2]}, cv=2)
        search.fit(zoo, targets("two numbers", 30))
        card = model_card(search, tmp_path / "scores.svg", targets=["a", "b"])
        assert card.select("Model description").content.startswith("A regression model for LoRA ")
        scores = card.select("Model description/Evaluation Results/Scores").table
        assert scores["architecture"] == ["gl-net"]
        assert scores["standard deviation over folds"] != ["one fold"]

    def test_transformed_targets(self, zoo, tmp_path):
        model = make_architecture("svd", "regression", device="cpu", random_state=0)
        model = TransformedTargetRegressor(model, func=np.arcsinh, inverse_func=np.sinh)
        search = GridSearchCV(model, {"regressor__model__max_epochs": [1]}, cv=2)
        card = model_card(search.fit(zoo, targets("one number", 30)), tmp_path / "scores.png")
        assert 'layout=model.regressor_["features"].layout_' in card.render()

    def test_refusals(self, zoo, tmp_path):
        search = GridSearchCV(make_pipeline(PCA(2), Ridge()), {"pca__n_components": [1]}, cv=2)
        with pytest.raises(NotFittedError):
            model_card(search, tmp_path / "scores.png")
        unfitted = clone(search).set_params(refit=False)
        unfitted.fit(np.asarray(zoo), targets("one number", 30))
        with pytest.raises(NotFittedError, match="best_estimator_: pass a search that was fitted"):
            model_card(unfitted, tmp_path / "scores.png")
        search.fit(np.asarray(zoo), targets("one number", 30))
        with pytest.raises(ValueError, match="no part of Pipeline was fitted on adapters"):
            model_card(search, tmp_path / "scores.png")
        # Behind the step that forgets what the columns are, there are rows of numbers.
        model = make_pipeline(PCA(2), MLPNetRegressor(max_epochs=1, device="cpu"))
        search = GridSearchCV(model, {}, cv=2).fit(zoo, targets("one number", 30))
        with pytest.raises(ValueError, match="no part of Pipeline was fitted on adapters"):
            model_card(search, tmp_path / "scores.png")
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("missing", ["skops.card", "matplotlib"])
    def test_missing_package(self, zoo, tmp_path, monkeypatch, missing):
        model = make_architecture("svd", device="cpu").set_params(model__max_epochs=1)
        search = GridSearchCV(model, {}, cv=2).fit(zoo, targets("binary", 30))
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ImportError, match="pip install 'sklora"):
            model_card(search, tmp_path / "scores.png")
        assert os.listdir(tmp_path) == []
