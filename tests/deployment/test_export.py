"""Programs and ONNX files of GL-nets agree with their estimators."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sklearn.exceptions import NotFittedError

import sklora
from sklora import (
    GLNetClassifier,
    GLNetRegressor,
    LoRACollection,
    LoRALayout,
    MLPNetClassifier,
    make_architecture,
)
from sklora.deployment import export_onnx, export_program, program_inputs
from sklora.testing import apply_gauge
from tests.deployment.zoo import SHAPES, make_zoo, targets

# Of probabilities, and of targets that have unit size. Torch rounds the constants in ONNX's gates
# to float32.
PROGRAM = {"rtol": 1e-10, "atol": 1e-10}
ONNX = {"rtol": 1e-6, "atol": 1e-6}
GAUGE = {"rtol": 1e-7, "atol": 1e-7}

CASES = [
    ("flatten", "sigmoid", "binary", False),
    ("mean", "silu", "two numbers", True),
    ("flatten", "sign_relu", "multilabel", True),
    pytest.param(("mean", "sigmoid", "multiclass", False), marks=pytest.mark.slow),
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

    # Torch 2.11 warns of what it does itself.
    @pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
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

    @pytest.mark.parametrize("export", [export_program, lambda net: export_onnx(net, "none.onnx")])
    @pytest.mark.parametrize("name", [" + str(print('ran')) + ", 'a"b'])
    def test_names_that_torch_takes_for_code_are_refused(self, export, name):
        """Torch writes them into a message of its guards, of which a quote is the end."""
        layout = LoRALayout([("q", 3, 2, 1), (name, 4, 2, 1)])
        X = LoRACollection.from_array(np.ones((12, layout.width)), layout)
        model = GLNetRegressor(max_epochs=1, device="cpu").fit(X, np.arange(12.0))
        with pytest.raises(ValueError, match="has a quote in its name"):
            export(model)
        assert not os.path.exists("none.onnx")

    @pytest.mark.parametrize("name", ["a\\", "a\nb", "{a}", "a b:U", "\u00fc", "L[factors][q][0]"])
    def test_other_names_are_names(self, name):
        layout = LoRALayout([("q", 3, 2, 1), (name, 4, 2, 1)])
        flat = np.random.default_rng(0).normal(size=(12, layout.width))
        X = LoRACollection.from_array(flat, layout)
        model = GLNetRegressor(max_epochs=1, device="cpu").fit(X, np.arange(12.0))
        result = export_program(model).module()(*program_inputs(model, X))
        np.testing.assert_allclose(result, model.predict(X), **PROGRAM)

    def test_inputs_are_checked(self, exported):
        with pytest.raises(NotFittedError):
            program_inputs(GLNetClassifier(), exported.zoo([[1]]))
        with pytest.raises(ValueError, match="module"):
            program_inputs(exported.estimator, LoRACollection.from_factors([{"q": ([[1]], [[1]])}]))

    def test_inputs_are_copied_once(self):
        layout = LoRALayout([("q", 500, 500, 4)])
        X = LoRACollection.from_array(np.ones((50, layout.width)), layout)
        model = GLNetRegressor(max_epochs=1, device="cpu").fit(X[:5], np.arange(5.0))
        tracemalloc.start()
        try:
            program_inputs(model, X)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 1.5 * 8 * len(X) * layout.width

    def test_one_rank_serves_all_modules(self):
        layout = LoRALayout([("q", 3, 2, 1), ("v", 4, 2, 2)])
        X = LoRACollection.from_array(np.ones((12, layout.width)), layout)
        model = GLNetRegressor(max_epochs=1, device="cpu").fit(X, np.arange(12.0))
        (factors,) = program_inputs(model, X)
        assert [tuple(factor.shape) for pair in factors.values() for factor in pair] == [
            (12, 3, 2), (12, 2, 2), (12, 4, 2), (12, 2, 2),
        ]  # fmt: skip


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
        (tmp_path / "model.onnx").symlink_to("other.onnx")
        export_onnx(model, tmp_path / "model.onnx")
        assert (tmp_path / "model.onnx").is_symlink()
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

    def test_nothing_is_multiplied_by_its_own_sigmoid(self, exported):
        """Onnxruntime before 1.31 makes of that an operation that it has for float32 alone."""
        nodes = onnx.load(exported.onnx_path).graph.node
        sigmoids = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Sigmoid"}
        for node in nodes:
            if node.op_type == "Mul":
                assert {sigmoids.get(name) for name in node.input}.isdisjoint(node.input)

    def test_refuses_a_spectrum(self, tmp_path, monkeypatch):
        monkeypatch.setattr("sklora.deployment._export.export_program", None)  # before the work
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

    def test_places_that_no_file_can_be_written_to(self, tmp_path, monkeypatch):
        monkeypatch.setattr("sklora.deployment._export.export_program", None)  # before the work
        with pytest.raises(ValueError, match=rf"path='{tmp_path}' is a folder; name a file in it"):
            export_onnx(GLNetRegressor(), tmp_path)
        with pytest.raises(FileNotFoundError, match=r"no/m.onnx': there is no folder .*; make it"):
            export_onnx(GLNetRegressor(), tmp_path / "no" / "m.onnx")

    @pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
    def test_missing_package(self, monkeypatch, missing):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ModuleNotFoundError, match=rf"and {missing} is.*'sklora\[onnx\]'"):
            export_onnx(GLNetClassifier(), "none.onnx")


def test_import_needs_no_optional_package():
    missing = ("onnx", "onnxscript", "skops", "matplotlib", "pandas", "skorch")
    script = f"import sys; sys.modules.update(dict.fromkeys({missing})); import sklora.deployment"
    subprocess.run([sys.executable, "-c", script], check=True)
