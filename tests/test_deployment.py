"""Programs and ONNX files of GL-nets agree with their estimators; cards say what a search found."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import skops.io
import torch
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline

import sklora
from sklora import (
    GLNetClassifier,
    GLNetRegressor,
    LoRACollection,
    LoRALayout,
    MLPNetClassifier,
    MLPNetRegressor,
    SVDSpectrum,
    architecture_grid,
    make_architecture,
)
from sklora.deployment import export_onnx, export_program, model_card, program_inputs
from sklora.io import write_adapter
from sklora.testing import apply_gauge

SHAPES = ((6, 4), (5, 3), (6, 4), (1, 4), (5, 1))
# Of probabilities, and of targets that have unit size. Torch rounds the constants in ONNX's gates
# to float32.
PROGRAM = {"rtol": 1e-10, "atol": 1e-10}
ONNX = {"rtol": 1e-6, "atol": 1e-6}
GAUGE = {"rtol": 1e-7, "atol": 1e-7}


def make_zoo(ranks, side=False, seed=0) -> LoRACollection:
    """Adapters of these ranks (N, n_modules), where 0 leaves a module out."""
    rng = np.random.default_rng(seed)
    names = [f"block.{place}.to_q" for place in range(len(SHAPES))]
    factors = [
        {
            name: (rng.normal(size=(n, r)), rng.normal(size=(m, r)))
            for name, (n, m), r in zip(names, SHAPES, row, strict=True)
            if r
        }
        for row in ranks
    ]
    layout = LoRALayout(
        [(name, n, m, int(np.max(ranks))) for name, (n, m) in zip(names, SHAPES, strict=True)],
        side=[("magnitude", 3)] if side else [],
        base_model="tiny",
    )
    extra = {"side": [{"magnitude": rng.normal(size=3)} for _ in factors]} if side else {}
    return LoRACollection.from_factors(factors, layout=layout, **extra)


def targets(kind, n):
    numbers = np.random.default_rng(1).normal(size=(n, 3))
    return {
        "binary": np.where(np.arange(n) % 2, "no", "yes"),
        "multiclass": np.arange(n) % 3,
        "multilabel": (numbers > 0).astype(int),
        "one number": 3 + numbers[:, 0],
        "two numbers": numbers[:, :2] * [1, 1000] + [0, 500],
    }[kind]


CASES = [
    ("flatten", "sigmoid", "binary", False),
    ("mean", "silu", "multiclass", False),
    ("flatten", "sign_relu", "multilabel", True),
    ("mean", "sigmoid", "two numbers", True),
    pytest.param(("flatten", "silu", "one number", False), marks=pytest.mark.slow),
    pytest.param(("mean", "sign_relu", "binary", True), marks=pytest.mark.slow),
]


@dataclass
class Exported:
    """A fitted estimator, its program and its ONNX file."""

    estimator: Any
    side: bool
    program: torch.export.ExportedProgram
    onnx_path: str

    def zoo(self, ranks, seed=7):
        return make_zoo(np.broadcast_to(ranks, (len(ranks), len(SHAPES))), self.side, seed)

    def expected(self, X):
        if isinstance(self.estimator, GLNetClassifier):
            return self.estimator.predict_proba(X)
        return self.estimator.predict(X)

    def by_onnx(self, X):
        return run_onnx(self.onnx_path, self.estimator, X)


def run_onnx(path, estimator, X):
    factors, *side = program_inputs(estimator, X)
    feed = {
        f"{name}:{letter}": factor.numpy()
        for name, pair in factors.items()
        for letter, factor in zip("UV", pair, strict=True)
    }
    if side:
        feed["side"] = side[0].numpy()
    [result] = onnxruntime.InferenceSession(path).run(None, feed)
    return result


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def exported(request, tmp_path_factory):
    head, nonlinearity, kind, side = request.param
    estimator = GLNetRegressor if "number" in kind else GLNetClassifier
    net = estimator(
        head=head,
        nonlinearity=nonlinearity,
        n_layers=2,
        hidden_dim=4,
        mlp_hidden=(8, 8),
        max_epochs=2,
        random_state=0,
        device="cpu",
    )
    X = make_zoo(np.full((24, len(SHAPES)), 2), side)
    net.fit(X, targets(kind, len(X)))
    path = str(tmp_path_factory.mktemp("onnx") / "model.onnx")
    export_onnx(net, path)
    return Exported(net, side, export_program(net), path)


BATCHES = {
    "one of rank 1": [[1]],
    "seven of rank 5": [[5]] * 7,
    "one of rank 6": [[6]],
    "mixed ranks": [[1, 4, 2, 3, 1], [4, 1, 1, 2, 3], [2, 2, 5, 1, 1]],
    "modules missing": [[2, 0, 3, 1, 1], [0, 1, 0, 3, 2], [1, 1, 1, 0, 0], [3, 2, 1, 1, 1]],
}


@pytest.mark.parametrize("batch", BATCHES)
class TestAgreement:
    """On batches and ranks that nothing was traced with."""

    def test_program(self, exported, batch):
        X = exported.zoo(BATCHES[batch])
        result = exported.program.module()(*program_inputs(exported.estimator, X))
        assert result.dtype == torch.float64
        np.testing.assert_allclose(result, exported.expected(X), **PROGRAM)

    def test_onnx(self, exported, batch):
        X = exported.zoo(BATCHES[batch])
        np.testing.assert_allclose(exported.by_onnx(X), exported.expected(X), **ONNX)

    def test_in_another_gauge(self, exported, batch):
        X = exported.zoo(BATCHES[batch])
        disguised = apply_gauge(X, condition=100.0, random_state=0)
        result = exported.program.module()(*program_inputs(exported.estimator, disguised))
        np.testing.assert_allclose(result, exported.expected(X), **GAUGE)
        np.testing.assert_allclose(exported.by_onnx(disguised), exported.expected(X), **ONNX)


class TestProgram:
    def test_answers_depend_on_the_adapters(self, exported):
        # Else everything above would agree on a constant.
        X = exported.zoo([[2]] * 5)
        assert np.ptp(exported.expected(X), axis=0).min() > 100 * ONNX["atol"]

    def test_is_saved_and_loaded(self, exported):
        file = io.BytesIO()
        torch.export.save(exported.program, file)
        file.seek(0)
        loaded = torch.export.load(file)
        X = exported.zoo([[3], [1]])
        result = loaded.module()(*program_inputs(exported.estimator, X))
        np.testing.assert_allclose(result, exported.expected(X), **PROGRAM)

    def test_padding_changes_nothing(self, exported):
        X = exported.zoo([[2], [1]])
        factors, *side = program_inputs(exported.estimator, X)
        padded = {
            name: tuple(torch.nn.functional.pad(factor, (0, 4)) for factor in pair)
            for name, pair in reversed(factors.items())
        }
        result = exported.program.module()(padded, *side)
        np.testing.assert_allclose(result, exported.expected(X), **PROGRAM)

    def test_needs_no_gradients(self, exported):
        assert not any(value.requires_grad for value in exported.program.state_dict.values())

    @pytest.mark.parametrize("change", ["rank of V", "rows of U", "batch", "missing"])
    def test_wrong_shapes_are_refused(self, exported, change):
        X = exported.zoo([[2], [2]])
        factors, *side = program_inputs(exported.estimator, X)
        name = X.layout.names[0]
        U, V = factors[name]
        if change == "missing":
            del factors[name]
        else:
            factors[name] = {
                "rank of V": (U, V[:, :, :1]),
                "rows of U": (U[:, :1], V),
                "batch": (U[:1], V[:1]),
            }[change]
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            exported.program.module()(factors, *side)

    def test_plain_rows(self):
        X = np.random.default_rng(0).normal(size=(20, 5))
        model = GLNetClassifier(max_epochs=1, device="cpu").fit(X, X[:, 0] > 0)
        result = export_program(model).module()(*program_inputs(model, X[:1]))
        np.testing.assert_allclose(result, model.predict_proba(X[:1]), **PROGRAM)

    @pytest.mark.parametrize("side", [False, True], ids=["factors", "side"])
    def test_spectrum(self, side):
        """One program for all batches and ranks, one adapter of rank 1 among them."""
        X = make_zoo(np.full((24, len(SHAPES)), 2), side)
        model = GLNetClassifier(spectrum=True, hidden_dim=4, max_epochs=2, device="cpu")
        model.fit(X, targets("multiclass", len(X)))
        program = export_program(model).module()
        for ranks in BATCHES.values():
            Z = make_zoo(np.broadcast_to(ranks, (len(ranks), len(SHAPES))), side, seed=7)
            for given in (Z, apply_gauge(Z, condition=100.0, random_state=0)):
                result = program(*program_inputs(model, given))
                np.testing.assert_allclose(result, model.predict_proba(Z), **GAUGE)

    def test_default_device_makes_no_difference(self):
        rows = np.random.default_rng(0).normal(size=(20, 5))
        model = GLNetRegressor(max_epochs=1, device="cpu").fit(rows, rows[:, 0])
        with torch.device("meta"):  # a device that has no numbers
            program = export_program(model)
        predicted = program.module()(*program_inputs(model, rows))
        np.testing.assert_allclose(predicted, model.predict(rows), **PROGRAM)

    def test_spectrum_of_plain_rows(self):
        X = np.random.default_rng(0).normal(size=(20, 5))
        model = GLNetRegressor(spectrum=True, max_epochs=1, device="cpu").fit(X, X[:, 0])
        result = export_program(model).module()(*program_inputs(model, X[:3]))
        np.testing.assert_allclose(result, model.predict(X[:3]), **PROGRAM)

    def test_needs_no_sklora(self, tmp_path):
        X = make_zoo(np.full((12, len(SHAPES)), 2))
        model = GLNetRegressor(max_epochs=1, device="cpu").fit(X, targets("one number", 12))
        torch.export.save(export_program(model), tmp_path / "model.pt2")
        torch.save(program_inputs(model, X), tmp_path / "inputs.pt")
        script = (
            "import sys, torch\n"
            "sys.modules['sklora'] = None\n"
            "program = torch.export.load(sys.argv[1] + '/model.pt2')\n"
            "inputs = torch.load(sys.argv[1] + '/inputs.pt')\n"
            "torch.save(program.module()(*inputs), sys.argv[1] + '/result.pt')"
        )
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
        result = torch.load(tmp_path / "result.pt")
        np.testing.assert_allclose(result, model.predict(X), **PROGRAM)

    @pytest.mark.parametrize("export", [export_program, lambda net: export_onnx(net, "none.onnx")])
    def test_refusals(self, export):
        with pytest.raises(TypeError, match=r"type Pipeline.*pass pipeline\['model'\]"):
            export(make_architecture("gl-net"))
        with pytest.raises(TypeError, match="type MLPNetClassifier"):
            export(MLPNetClassifier())
        with pytest.raises(NotFittedError):
            export(GLNetClassifier())
        assert not os.path.exists("none.onnx")

    def test_inputs_are_checked(self, exported):
        with pytest.raises(NotFittedError):
            program_inputs(GLNetClassifier(), exported.zoo([[1]]))
        with pytest.raises(ValueError, match="module"):
            program_inputs(exported.estimator, LoRACollection.from_factors([{"q": ([[1]], [[1]])}]))


class TestOnnx:
    def test_says_what_it_is(self, exported):
        model = onnx.load(exported.onnx_path)
        onnx.checker.check_model(model, full_check=True)
        dims = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in model.graph.input
        }
        expected = {}
        for name, n, m, _ in exported.estimator.layout_.modules:
            expected[f"{name}:U"] = ["batch", n, "rank"]
            expected[f"{name}:V"] = ["batch", m, "rank"]
        if exported.side:
            expected["side"] = ["batch", 3]
        assert list(dims.items()) == list(expected.items())
        is_classifier = isinstance(exported.estimator, GLNetClassifier)
        output = "probabilities" if is_classifier else "predictions"
        assert [value.name for value in model.graph.output] == [output]
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata["sklora_version"] == sklora.__version__
        assert metadata["base_model"] == "tiny"
        classes = getattr(exported.estimator, "classes_", None)
        if is_classifier and not exported.estimator.multilabel_:
            assert json.loads(metadata["classes"]) == classes.tolist()
        else:
            assert "classes" not in metadata

    def test_classes_of_any_type(self, tmp_path):
        X = np.random.default_rng(0).normal(size=(20, 5))
        days = np.array(["2026-11-01", "2026-11-26"], "datetime64[D]")
        model = GLNetClassifier(max_epochs=1, device="cpu").fit(X, days[np.arange(20) % 2])
        export_onnx(model, tmp_path / "model.onnx")
        [classes] = [
            entry.value
            for entry in onnx.load(tmp_path / "model.onnx").metadata_props
            if entry.key == "classes"
        ]
        assert json.loads(classes) == ["2026-11-01", "2026-11-26"]

    def test_is_plain(self, exported):
        """In float64, whole in one file, and of no custom operators."""
        model = onnx.load(exported.onnx_path, load_external_data=False)
        tensors = model.graph.initializer
        assert onnx.TensorProto.FLOAT not in {tensor.data_type for tensor in tensors}
        assert not any(tensor.external_data for tensor in tensors)
        assert [opset.domain for opset in model.opset_import] == [""]

    def test_refuses_a_spectrum(self, tmp_path):
        X = np.random.default_rng(0).normal(size=(20, 5))
        model = GLNetRegressor(spectrum=True, max_epochs=1, device="cpu").fit(X, X[:, 0])
        with pytest.raises(ValueError, match=r"spectrum is True.*export_program.*spectrum=False"):
            export_onnx(model, tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())

    def test_failed_writing_leaves_the_old_file(self, tmp_path, monkeypatch):
        X = make_zoo(np.full((12, len(SHAPES)), 2))
        model = GLNetRegressor(max_epochs=1, device="cpu").fit(X, targets("one number", 12))
        path = tmp_path / "model.onnx"
        path.write_bytes(b"before")

        def full(*arguments):
            raise OSError("disk full")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="disk full"):
            export_onnx(model, path)
        assert path.read_bytes() == b"before"
        assert os.listdir(tmp_path) == ["model.onnx"]

    @pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
    def test_missing_package(self, monkeypatch, missing):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ModuleNotFoundError, match=rf"and {missing} is.*'sklora\[onnx\]'"):
            export_onnx(GLNetClassifier(), "none.onnx")


def test_import_needs_no_optional_package():
    missing = ("onnx", "onnxscript", "skops", "matplotlib", "pandas", "skorch")
    script = f"import sys; sys.modules.update(dict.fromkeys({missing})); import sklora.deployment"
    subprocess.run([sys.executable, "-c", script], check=True)


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
        card = model_card(search, tmp_path / "scores.png", targets=["style"])
        card.save(tmp_path / "README.md")
        text = (tmp_path / "README.md").read_text()
        assert "A classification model for LoRA adapters, which predicts 'style'" in text
        assert "base model 'tiny'. Classes: 'no', 'yes'." in text
        assert "5 modules, and 3 columns of side features" in text
        assert "3 folds, `cv=GroupKFold(n_splits=3" in text
        assert "![Comparison](scores.png)" in text
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
                FeatureUnion([("pca", PCA(2)), ("svd", SVDSpectrum(device="cpu"))]),
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
        for name, adapter in zip("ab", zoo, strict=False):
            write_adapter(tmp_path / "adapters" / name, adapter, base_model="tiny")
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

    def test_classes_are_no_labels(self, zoo, tmp_path):
        model = GLNetClassifier(max_epochs=1, device="cpu")
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

    def test_names_are_no_markup(self, tmp_path):
        factors = np.ones((30, 3, 1)) * np.arange(30)[:, None, None]
        X = LoRACollection.from_factors(
            ({"a|b": (U, U), "<img src=x>": (U, U)} for U in factors), base_model="<b>tiny</b>"
        )
        model = GLNetClassifier(max_epochs=1, device="cpu")
        search = GridSearchCV(model, {}, cv=2).fit(X, np.where(np.arange(30) % 2, "*x*", "<y>"))
        text = model_card(search, tmp_path / "my scores.png", targets=np.array(["`t`"])).render()
        assert "which predicts '&#96;t&#96;'." in text
        assert "Classes: '&#42;x&#42;', '&#60;y&#62;'." in text
        assert text.count("'&#60;b&#62;tiny&#60;/b&#62;'") == 2
        assert [line.count("|") for line in text.splitlines() if "&#124;" in line] == [5]
        assert "<img" not in text
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
        search.fit(zoo, targets("one number", 30))
        card = model_card(search, tmp_path / "scores.svg")
        assert card.select("Model description").content.startswith("A regression model for LoRA ")
        scores = card.select("Model description/Evaluation Results/Scores").table
        assert scores["architecture"] == ["gl-net"]

    def test_refusals(self, zoo, tmp_path):
        search = GridSearchCV(make_pipeline(PCA(2), Ridge()), {"pca__n_components": [1]}, cv=2)
        with pytest.raises(NotFittedError):
            model_card(search, tmp_path / "scores.png")
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
