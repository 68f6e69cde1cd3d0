import csv
import io
import json
import os
import shutil
import sys
import warnings

import numpy as np
import pytest
import sklearn

from sklora._saved import read_model
from sklora.cli._predict import predict
from sklora.cli._reading import OneByOne
from sklora.estimators._base import BaseNetEstimator
from sklora.io import read_adapters, write_adapter

SHAPES = {"layers.0.q_proj": (6, 4), "layers.0.v_proj": (5, 4)}


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def path_in(folder):
    return str(folder / "adapter_model.safetensors")


class TestCsv:
    def test_classes(self, run, models, zoo):
        code, out, err = run("predict", models["style"], zoo)
        rows = rows_of(out)
        X = read_adapters(zoo)
        model, _ = read_model(models["style"])
        assert (code, err) == (0, "")
        assert list(rows[0]) == [
            "path", "prediction", "large:probability", "small:probability", "error",
        ]  # fmt: skip
        assert [row["path"] for row in rows] == X.ids.tolist()
        assert [row["prediction"] for row in rows] == model.predict(X).tolist()
        shares = [
            [float(row["large:probability"]), float(row["small:probability"])] for row in rows
        ]
        np.testing.assert_allclose(shares, model.predict_proba(X), rtol=1e-12)

    def test_labels(self, run, models, zoo):
        rows = rows_of(run("predict", models["labels"], zoo / "a00", zoo / "a01").out)
        assert list(rows[0]) == [
            "path", "big", "big:probability", "tiny", "tiny:probability", "error",
        ]  # fmt: skip
        assert [(row["big"], row["tiny"]) for row in rows] == [("0", "1"), ("1", "0")]
        assert float(rows[1]["big:probability"]) > 0.5 > float(rows[1]["tiny:probability"])
        assert [row["error"] for row in rows] == ["", ""]

    def test_numbers(self, run, models, zoo):
        rows = rows_of(run("predict", models["loss"], zoo / "a00", zoo / "a01", "--csv").out)
        assert list(rows[0]) == ["path", "loss", "error"]
        assert float(rows[0]["loss"]) < 1.7 < float(rows[1]["loss"])

    @pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
    def test_name_that_holds_the_end_of_a_line_is_one_cell(
        self, run, models, tmp_path, factors, end
    ):
        write_adapter(tmp_path / f"a{end}b", factors(), base_model="tiny/llama")
        out = run("predict", models["loss"], tmp_path).out
        [row] = csv.DictReader(io.StringIO(out, newline=""))
        assert row["path"] == path_in(tmp_path / f"a{end}b")

    def test_spaces_around_a_name_stay(self, run, models, tmp_path, factors, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_adapter(" a", factors(), base_model="tiny/llama")
        [row] = rows_of(run("predict", models["loss"], " a").out)
        assert row["path"] == " a/adapter_model.safetensors"

    def test_controls_reach_no_terminal(self, run, models, tmp_path, factors, monkeypatch):
        write_adapter(tmp_path / "\x1b[2J", factors(), base_model="tiny/llama")
        assert "\x1b" in run("predict", models["loss"], tmp_path).out
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        out = run("predict", models["loss"], tmp_path).out
        assert "\x1b[2J" not in out
        assert "\\x1b[2J" in out


class TestJson:
    def test_classes(self, run, models, zoo):
        code, out, _ = run("predict", models["style"], zoo / "a00", zoo / "a01", "--json")
        small, large = json.loads(out)
        assert code == 0
        assert small["path"] == path_in(zoo / "a00")
        assert (small["prediction"], large["prediction"]) == ("small", "large")
        assert sum(small["probability"].values()) == pytest.approx(1)
        assert small["probability"]["small"] > 0.5 < large["probability"]["large"]

    def test_labels(self, run, models, zoo):
        [entry] = json.loads(run("predict", models["labels"], zoo / "a01", "--json").out)
        assert entry["prediction"] == {"big": 1, "tiny": 0}
        assert set(entry["probability"]) == {"big", "tiny"}
        assert entry["probability"]["big"] > 0.5 > entry["probability"]["tiny"]

    def test_numbers(self, run, models, zoo):
        [entry] = json.loads(run("predict", models["loss"], zoo / "a01", "--json").out)
        assert set(entry) == {"path", "prediction"}
        assert entry["prediction"]["loss"] > 1.7


@pytest.mark.parametrize("form", ["--csv", "--json"])
def test_predictions_come_as_they_are_made(run, models, zoo, monkeypatch, form):
    flushed = set()

    class Stream(io.StringIO):
        def flush(self):
            flushed.add(self.tell())

    monkeypatch.setattr("sklora.cli._predict._MOST_PER_BLOCK", 1)
    monkeypatch.setattr(sys, "stdout", Stream())
    assert run("predict", models["loss"], zoo / "a00", zoo / "a01", form).code == 0
    assert len(flushed) == 3  # after each of the two, and the header or the closing bracket


@pytest.mark.parametrize("name", ["style", "labels", "loss"])
def test_answers_are_the_models_at_one_pass_of_the_network(models, zoo, monkeypatch, name):
    (model, _), X = read_model(models[name]), read_adapters(zoo)
    expected = [model.predict(X).reshape(len(X), -1).tolist(), [[]] * len(X)]
    if name != "loss":
        expected[1] = model.predict_proba(X).tolist()
    passes, outputs = [], BaseNetEstimator._outputs
    monkeypatch.setattr(
        BaseNetEstimator, "_outputs", lambda *args: passes.append(1) or outputs(*args)
    )
    given = predict(model, X)
    assert [[list(one.values) for one in given], [list(one.probabilities) for one in given]] == (
        expected
    )
    assert len(passes) == 1


class TestBadFiles:
    @pytest.fixture
    def uploads(self, zoo, tmp_path):
        """good, cut off, missing, NaN, good."""
        for name in ("a00", "a01", "a02", "a03"):
            shutil.copytree(zoo / name, tmp_path / name)
        cut, nan = tmp_path / "a01", tmp_path / "a02"
        data = (cut / "adapter_model.safetensors").read_bytes()
        (cut / "adapter_model.safetensors").write_bytes(data[:-9])
        data = (nan / "adapter_model.safetensors").read_bytes()
        (nan / "adapter_model.safetensors").write_bytes(data[:-8] + np.float64("nan").tobytes())
        return [tmp_path / name for name in ("a00", "a01", "none", "a02", "a03")]

    def test_keep_the_order(self, run, models, uploads):
        code, out, err = run("predict", models["style"], *uploads)
        rows = rows_of(out)
        assert code == 1
        assert [row["prediction"] for row in rows] == ["small", "", "", "", "large"]
        assert [bool(row["error"]) for row in rows] == [False, True, True, True, False]
        assert "NaN" in rows[3]["error"]
        assert [line.split(": ")[1] for line in err.splitlines()] == [
            path_in(uploads[1]), str(uploads[2]), path_in(uploads[3]),
        ]  # fmt: skip

    @pytest.mark.parametrize("size", [1e80, 1e100, 1e200])
    def test_numbers_too_large_to_predict_from(self, size, run, models, zoo, tmp_path, factors):
        """Rather than the first class, with no probabilities."""
        large = {name: (size * U, size * V) for name, (U, V) in factors(shapes=SHAPES).items()}
        write_adapter(tmp_path / "large", large)
        code, out, _ = run("predict", models["style"], zoo / "a00", tmp_path / "large", zoo / "a01")
        rows = rows_of(out)
        assert code == 1
        assert [row["prediction"] for row in rows] == ["small", "", "large"]
        assert [bool(row["small:probability"]) for row in rows] == [True, False, True]
        assert rows[1]["error"]
        assert "\n" not in rows[1]["error"]

    def test_in_json(self, run, models, uploads):
        code, out, _ = run("predict", models["style"], *uploads, "--json")
        entries = json.loads(out)
        assert code == 1
        assert [set(entry) == {"path", "error"} for entry in entries] == [0, 1, 1, 1, 0]

    def test_only_bad_ones(self, run, models, tmp_path):
        code, out, _ = run("predict", models["style"], tmp_path / "none", "--json")
        assert code == 1
        assert len(json.loads(out)) == 1

    def test_folder_without_an_adapter(self, run, models, zoo, tmp_path):
        code, out, _ = run("predict", models["loss"], tmp_path, zoo / "a00")
        rows = rows_of(out)
        assert code == 1
        assert [row["path"] for row in rows] == [str(tmp_path), path_in(zoo / "a00")]
        assert "there is no adapter in it" in rows[0]["error"]
        assert rows[1]["loss"]

    @pytest.mark.parametrize("error", [ValueError, MemoryError, RuntimeError])
    def test_adapter_that_the_model_fails_on(self, run, models, zoo, monkeypatch, error):
        def failing(model, loras):
            if any("a01" in path for path in loras.ids.tolist()):
                raise error("too large\n\nadvice")
            return predict(model, loras)

        monkeypatch.setattr("sklora.cli._predict.predict", failing)
        code, out, _ = run("predict", models["style"], *(zoo / f"a0{n}" for n in range(3)))
        assert code == 1
        assert [row["error"] for row in rows_of(out)] == ["", "too large", ""]

    def test_no_memory_to_read_one(self, run, models, zoo, monkeypatch):
        def failing(self, found):
            if "a01" in found.path:
                raise MemoryError  # of which Python says nothing
            return read(self, found)

        read = OneByOne.read
        monkeypatch.setattr(OneByOne, "read", failing)
        code, out, _ = run("predict", models["style"], *(zoo / f"a0{n}" for n in range(3)))
        assert code == 1
        assert [row["error"] for row in rows_of(out)] == ["", "MemoryError", ""]

    def test_in_small_blocks(self, run, models, uploads, monkeypatch):
        def predictions():
            rows = rows_of(run("predict", models["style"], *uploads).out)
            shares = [float(row.pop("large:probability") or 0) for row in rows]
            return shares, [{**row, "small:probability": None} for row in rows]

        sizes = []
        monkeypatch.setattr(
            "sklora.cli._predict.predict",
            lambda model, loras: sizes.append(len(loras)) or predict(model, loras),
        )
        shares, whole = predictions()
        assert sizes == [2]
        sizes.clear()
        monkeypatch.setattr("sklora.cli._predict._MOST_PER_BLOCK", 1)
        assert predictions() == (pytest.approx(shares), whole)
        assert max(sizes) == 1
        monkeypatch.setattr("sklora.cli._predict._MOST_PER_BLOCK", 256)
        sizes.clear()
        with sklearn.config_context(working_memory=1e-6):
            assert predictions() == (pytest.approx(shares), whole)
        assert max(sizes) == 1

    def test_json_is_ascii_whatever_the_name(self, run, models, tmp_path):
        """What a stream has no place for is escaped as Python does it, which is no JSON."""
        name = os.fsdecode(os.fsencode(tmp_path / "é") + b"\xff")
        out = run("predict", models["style"], name, "--json").out
        assert out.isascii()
        assert json.loads(out)[0]["path"] == name


class TestBlocks:
    """What is said of one adapter does not depend on the others."""

    @pytest.fixture
    def sizes(self, monkeypatch):
        sizes = []
        monkeypatch.setattr(
            "sklora.cli._predict.predict",
            lambda model, loras: sizes.append(len(loras)) or predict(model, loras),
        )
        return sizes

    def test_adapters_of_different_ranks_go_together(self, run, models, tmp_path, factors, sizes):
        for rank in (1, 3, 2):
            write_adapter(tmp_path / str(rank), factors(rank=rank))
        assert run("predict", models["style"], tmp_path).code == 0
        assert sizes == [3]

    def test_adapters_of_different_dtypes_do_not(self, run, models, tmp_path, factors, sizes):
        for n, dtype in enumerate([np.float32, np.float64, np.float64]):
            pairs = factors().items()
            adapter = {name: (U.astype(dtype), V.astype(dtype)) for name, (U, V) in pairs}
            write_adapter(tmp_path / str(n), adapter)
        together = rows_of(run("predict", models["style"], tmp_path).out)
        assert sizes == [1, 2]
        alone = [rows_of(run("predict", models["style"], tmp_path / str(n)).out) for n in range(2)]
        assert together[0] == alone[0][0]

    def test_fit_four_times_into_the_working_memory(self, run, models, zoo, sizes):
        size = read_adapters(zoo / "a00").nbytes
        for fitting, expected in ((3, [3, 3, 2]), (5, [5, 3])):
            sizes.clear()
            with sklearn.config_context(working_memory=4 * fitting * size / 2**20):
                run("predict", models["style"], *(zoo / f"a0{n}" for n in range(8)))
            assert sizes == expected

    def test_are_as_wide_as_their_widest_adapter(self, run, models, tmp_path, factors, sizes):
        for n, rank in enumerate((3, 1, 1, 1)):
            write_adapter(tmp_path / str(n), factors(rank=rank))
        size = read_adapters(tmp_path / "0").nbytes
        with sklearn.config_context(working_memory=4 * 3 * size / 2**20):
            assert run("predict", models["style"], tmp_path).code == 0
        assert sizes == [3, 1]


class TestOtherAdapters:
    """Refused by name, unless told otherwise."""

    @pytest.fixture
    def predict(self, run, models, tmp_path):
        def predict(adapter, *options, model=models["style"], base_model="tiny/llama"):
            write_adapter(tmp_path / "new", adapter, base_model=base_model)
            code, out, _ = run("predict", model, tmp_path / "new", *options)
            [row] = rows_of(out)
            assert row["path"] == path_in(tmp_path / "new")
            assert code == bool(row["error"])
            return row

        return predict

    def test_base_model(self, predict, factors):
        error = predict(factors(), base_model="huge/llama")["error"]
        assert "its base model is 'huge/llama'" in error
        assert "'tiny/llama'" in error
        assert "--allow-other-base-model" in error
        row = predict(factors(), "--allow-other-base-model", base_model="huge/llama")
        assert row["prediction"]

    def test_no_base_model(self, predict, factors):
        assert not predict(factors(), base_model=None)["error"]

    def test_missing_module(self, predict, factors):
        adapter = factors(shapes={"layers.0.q_proj": (6, 4)})
        error = predict(adapter)["error"]
        assert "it lacks 'layers.0.v_proj'" in error
        assert "--allow-other-modules" in error
        assert predict(adapter, "--allow-other-modules")["prediction"]

    def test_module_too_many(self, predict, factors):
        adapter = factors(shapes={**SHAPES, "layers.1.q_proj": (6, 4)})
        error = predict(adapter)["error"]
        assert "'layers.1.q_proj'" in error
        assert "--allow-other-modules" in error
        assert predict(adapter, "--allow-other-modules")["prediction"]

    @pytest.mark.parametrize("options", [(), ("--allow-other-modules", "--allow-other-base-model")])
    @pytest.mark.parametrize(
        "shapes", [{**SHAPES, "layers.0.q_proj": (7, 4)}, {"blocks.0.q_proj": (6, 4)}]
    )
    def test_another_model_altogether(self, predict, factors, shapes, options):
        assert "q_proj" in predict(factors(shapes=shapes), *options)["error"]

    def test_module_that_some_training_adapters_lacked(
        self, run, predict, tmp_path, factors, write_csv
    ):
        few, many = {"layers.0.q_proj": (6, 4)}, SHAPES
        for n in range(8):
            write_adapter(tmp_path / "zoo" / str(n), factors(n + 0.5, few if n % 2 else many))
        labels = write_csv(
            tmp_path / "l.csv", ("path", "loss"), [(str(n), n + 0.5) for n in range(8)]
        )
        model = tmp_path / "m.skops"
        options = ("--labels", labels, "--target", "loss", "--folds", "0", "-o", model)
        assert run("fit", tmp_path / "zoo", *options, "--architecture", "dense").code == 0
        assert predict(factors(shapes=few), model=model)["loss"]
        without = factors(shapes={"layers.0.v_proj": (5, 4)})
        assert "'layers.0.q_proj'" in predict(without, model=model)["error"]
        assert predict(without, "--allow-other-modules", model=model)["loss"]

    def test_higher_rank(self, run, predict, models, zoo, tmp_path, factors):
        assert predict(factors(rank=3))["prediction"]
        options = ("--labels", zoo / "labels.csv", "--target", "loss", "--folds", "0")
        model = tmp_path / "m.skops"
        assert run("fit", zoo, *options, "--architecture", "mlp", "-o", model).code == 0
        assert "rank 3" in predict(factors(rank=3), model=model)["error"]
        rows = rows_of(run("predict", model, zoo / "a00", tmp_path / "new", zoo / "a01").out)
        assert [bool(row["loss"]) for row in rows] == [True, False, True]

    def test_base_model_does_not_depend_on_the_others(self, run, tmp_path, factors, write_csv, zoo):
        for n in range(6):
            write_adapter(tmp_path / "zoo" / str(n), factors(n + 0.5))
            write_adapter(tmp_path / "new" / str(n), factors(), base_model=f"model{n}")
        labels = write_csv(
            tmp_path / "l.csv", ("path", "loss"), [(str(n), n + 0.5) for n in range(6)]
        )
        options = ("--labels", labels, "--target", "loss", "--folds", "0", "--architecture", "svd")
        assert run("fit", tmp_path / "zoo", *options, "-o", tmp_path / "m.skops").code == 0
        assert run("predict", tmp_path / "m.skops", tmp_path / "new").code == 0


class TestOptions:
    def test_reading_is_that_of_the_model(self, run, zoo, tmp_path):
        options = ("--labels", zoo / "labels.csv", "--target", "loss", "--folds", "0")
        options += ("--architecture", "svd", "--names", "raw", "-o", tmp_path / "m.skops")
        assert run("fit", zoo, *options).code == 0
        assert run("predict", tmp_path / "m.skops", zoo).code == 0
        assert run("predict", tmp_path / "m.skops", zoo / "a00", "--names", "canonical").code == 1

    def test_device(self, run, models, zoo, monkeypatch):
        devices, outputs = [], BaseNetEstimator._outputs
        monkeypatch.setattr(
            BaseNetEstimator,
            "_outputs",
            lambda self, X: devices.append(self.device) or outputs(self, X),
        )
        assert run("predict", models["style"], zoo / "a00", "--device", "cpu:0").code == 0
        assert devices[-1] == "cpu:0"
        code, _, err = run("predict", models["style"], zoo / "a00", "--device", "abacus")
        assert code == 2
        assert "--device='abacus'" in err

    def test_no_model(self, run, zoo, tmp_path):
        code, out, err = run("predict", tmp_path / "none.skops", zoo)
        assert (code, out) == (2, "")
        assert err == f"sklora: error: {tmp_path}/none.skops: No such file or directory.\n"

    def test_without_skops(self, run, models, zoo, monkeypatch):
        monkeypatch.setitem(sys.modules, "skops.io", None)
        code, out, err = run("predict", models["style"], zoo / "a00")
        assert (code, out) == (2, "")
        assert "pip install 'sklora[secure]'" in err

    def test_no_model_in_it(self, run, zoo, tmp_path):
        (tmp_path / "m.skops").write_text("nothing")
        code, out, err = run("predict", tmp_path / "m.skops", zoo)
        assert (code, out) == (2, "")
        assert "no model that sklora stored" in err

    def test_other_version_warns(self, run, models, zoo, monkeypatch):
        monkeypatch.setattr("sklora.__version__", "9.9.9")
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            code, _, err = run("predict", models["style"], zoo / "a00")
        assert code == 0
        assert "sklora: warning: " in err
        assert "9.9.9" in err
