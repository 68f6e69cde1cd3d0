import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import skops.io

from sklora import TRUSTED_TYPES, LoRACollection
from sklora._saved import optional_parts, read_model
from sklora.cli._fit import _say_epochs
from sklora.cli._scoring import make_folds
from sklora.cli._zoo import _in_memory, labelled_zoo
from sklora.io import read_adapters, write_adapter
from tests.cli.conftest import make_zoo


@pytest.fixture
def fit(run, tmp_path, few_epochs):
    """Fit quickly: a function of the zoo's paths and further options."""

    def fit(paths, *options, labels=None, target="style"):
        paths = paths if isinstance(paths, list) else [paths]
        labels = labels or f"{paths[0]}/labels.csv"
        options = ("--architecture", "svd", "--folds", "0", *options)
        output = ("-o", tmp_path / "model.skops")
        return run("fit", *paths, "--labels", labels, "--target", target, *output, *options)

    return fit


@pytest.fixture
def read_zoos(monkeypatch):
    """What the command reads."""
    zoos = []

    def read(args):
        zoos.append(labelled_zoo(args))
        return zoos[-1]

    monkeypatch.setattr("sklora.cli._fit.labelled_zoo", read)
    return zoos


class TestModel:
    def test_learns_and_is_a_skops_file(self, models, zoo):
        model = skops.io.load(models["style"], trusted=TRUSTED_TYPES)
        X = read_adapters(zoo)
        y = [("small", "large")[number % 2] for number in range(40)]
        assert model.score(X, y) == 1

    @pytest.mark.parametrize(
        ("name", "task", "targets", "classes"),
        [
            ("style", "classification", ("style",), ("large", "small")),
            ("labels", "classification", ("big", "tiny"), None),
            ("loss", "regression", ("loss",), None),
        ],
    )
    def test_card(self, models, name, task, targets, classes):
        model, card = read_model(models[name])
        assert (card.task, card.targets, card.classes) == (task, targets, classes)
        assert (card.architecture, card.n_adapters, card.scores) == ("svd", 40, None)
        assert card.layout == model["features"].layout_
        assert card.layout.base_model == "tiny/llama"
        assert model["features"].verbose == model["model"].verbose == 0

    def test_same_seed_same_model(self, fit, zoo, tmp_path):
        weights = []
        for _ in range(2):
            assert fit(zoo, "--seed", "3").code == 0
            weights.append(read_model(tmp_path / "model.skops")[0]["model"].weights_)
        for name, array in weights[0].items():
            np.testing.assert_array_equal(array, weights[1][name])
        assert fit(zoo, "--seed", "4").code == 0
        others = read_model(tmp_path / "model.skops")[0]["model"].weights_
        assert not all(np.array_equal(array, others[name]) for name, array in weights[0].items())

    def test_says_which_epoch_was_the_best(self, fit, zoo, tmp_path):
        assert "trained 2 epochs; too few adapters to hold some out\n" in fit(zoo).err
        err = fit(make_zoo(tmp_path / "more", 200)).err
        assert "sklora: training svd on all adapters\n" in err
        assert err.endswith(f"sklora: {tmp_path}/model.skops holds the model\n")
        history = read_model(tmp_path / "model.skops")[0]["model"].history_
        losses = [epoch["valid_loss"] for epoch in history]
        assert f"trained {len(losses)} epochs; " in err
        assert f" was lowest after epoch {np.argmin(losses) + 1}\n" in err

    def test_best_epoch_is_that_of_the_lowest_loss(self, capsys):
        history = [{"valid_loss": loss} for loss in (3.0, 2.0, 0.0, 0.0)]
        _say_epochs([SimpleNamespace(history_=history)])
        assert capsys.readouterr().err == (
            "sklora: trained 4 epochs; the loss on held-out adapters was lowest after epoch 3\n"
        )

    def test_options_of_reading_are_kept(self, fit, zoo, tmp_path):
        assert fit(zoo, "--names", "raw", "--scale", "2").code == 0
        _, card = read_model(tmp_path / "model.skops")
        assert (card.reading.names, card.reading.scale) == ("raw", 2.0)
        assert card.layout.names[0].startswith("base_model.model.")


class TestScores:
    def test_one_architecture(self, fit, zoo, tmp_path):
        code, out, err = fit(zoo, "--folds", "2")
        _, card = read_model(tmp_path / "model.skops")
        assert code == 0
        header, svd, constant = (line.split() for line in out.splitlines())
        assert header == ["architecture", "accuracy", "spread", "fit", "time"]
        assert svd[0] == "svd"
        assert constant == ["(constant)", "0.500"]
        assert "sklora: 40 adapters of tiny/llama, 2 modules\n" in err
        assert "sklora: predicts style: classification, 2 classes" in err
        assert card.scores["metric"] == "accuracy"
        assert card.scores["constant"] == 0.5
        assert card.scores["folds"] == len(card.scores["scores"]["svd"]) == 2
        assert not card.scores["grouped"]

    def test_auto_takes_the_best(self, fit, zoo, tmp_path):
        code, out, _ = fit(zoo, "--folds", "2", "--architecture", "auto", target="loss")
        _, card = read_model(tmp_path / "model.skops")
        means = {name: np.mean(scores) for name, scores in card.scores["scores"].items()}
        assert code == 0
        assert len(out.splitlines()) == 7
        assert len(means) == 5
        assert card.architecture == max(means, key=means.get)
        assert (card.scores["metric"], card.scores["constant"]) == ("R2", 0.0)

    def test_auto_takes_the_best_by_any_score(self, fit, zoo, tmp_path):
        options = ("--folds", "2", "--architecture", "auto", "--scoring", "neg_log_loss")
        assert fit(zoo, *options, target="big").code == 0
        _, card = read_model(tmp_path / "model.skops")
        means = {name: np.mean(scores) for name, scores in card.scores["scores"].items()}
        assert card.architecture == max(means, key=means.get)
        assert max(means.values()) < 0
        assert card.scores["metric"] == "neg_log_loss"
        assert card.scores["constant"] == pytest.approx(-np.log(2))

    def test_seed_is_that_of_the_folds_too(self, fit, zoo, monkeypatch):
        given = []
        monkeypatch.setattr(
            "sklora.cli._fit.make_folds",
            lambda zoo, *options: given.append(options) or make_folds(zoo, *options),
        )
        assert fit(zoo, "--folds", "2", "--seed", "3").code == 0
        assert given == [(2, 3)]

    def test_groups(self, fit, zoo, tmp_path):
        assert fit(zoo, "--folds", "2", "--groups", "run").code == 0
        assert read_model(tmp_path / "model.skops")[1].scores["grouped"]

    def test_many_labels(self, fit, zoo, tmp_path):
        code, _, err = fit(zoo, "--folds", "2", "--target", "big", target="tiny")
        assert code == 0
        what = "predicts tiny, big: classification, 2 labels (--task says otherwise)"
        assert f"sklora: {what}\n" in err
        assert read_model(tmp_path / "model.skops")[1].scores["constant"] == 0.5

    def test_rare_class(self, fit, zoo, tmp_path, write_csv):
        rows = [(f"a{number:02}", "abc"[(number > 5) + (number > 20)]) for number in range(20)]
        labels = write_csv(tmp_path / "l.csv", ("path", "style"), [*rows, ("a21", "c")])
        code, _, err = fit(zoo, "--folds", "2", labels=labels)
        assert code == 0
        assert "class c is too rare to be in every fold: 1 of 2" in err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--folds", "1"), "--folds is 1; cross-validation takes at least 2"),
            (("--folds", "41"), "--folds 41 is too many for 40 adapters"),
            (("--folds", "21"), "no class has 21 adapters"),
            (("--folds", "11", "--groups", "run"), "--folds 11 is too many for 10 groups"),
            (("--folds", "21", "--task", "regression", "--target", "loss"), "too many for 40"),
        ],
    )
    def test_too_few(self, fit, zoo, options, message):
        target = "big" if "--task" in options else "style"
        code, _, err = fit(zoo, *options, target=target)
        assert code == 2
        assert message in err


class TestIds:
    """How rows may name adapters."""

    @pytest.mark.parametrize(
        "name",
        [
            "{zoo}/a{n:02}/adapter_model.safetensors",
            "{zoo}/a{n:02}",
            "a{n:02}/adapter_model.safetensors",
            "a{n:02}",
            "./a{n:02}/",
        ],
    )
    def test_path(self, fit, zoo, tmp_path, write_csv, name):
        rows = [(name.format(zoo=zoo, n=n), n % 2) for n in range(6)]
        labels = write_csv(tmp_path / "l.csv", ("file", "style"), rows)
        code, _, err = fit(zoo, labels=labels)
        assert code == 0
        assert "left out, for want of a label: 34 of 40 adapters, " in err

    def test_path_as_it_was_passed(self, fit, zoo, tmp_path, write_csv, monkeypatch):
        monkeypatch.chdir(zoo.parent)
        rows = [(f"{zoo.name}/a{n:02}", n % 2) for n in range(6)]
        labels = write_csv(tmp_path / "l.csv", ("path", "style"), rows)
        assert fit(zoo.name, labels=labels).code == 0

    def test_path_from_the_labels(self, fit, zoo, write_csv, tmp_path):
        os.symlink(zoo, tmp_path / "link")
        rows = [(f"link/a{n:02}", n % 2) for n in range(6)]
        labels = write_csv(tmp_path / "l.csv", ("path", "style"), rows)
        paths = [str(tmp_path / "link" / f"a{n:02}") for n in range(6)]
        assert fit(paths, labels=labels).code == 0

    def test_files_in_one_folder(self, fit, tmp_path, factors, write_csv, monkeypatch):
        files = [tmp_path / f"{n}.safetensors" for n in range(4)]
        for file in files:
            write_adapter(tmp_path, factors())
            os.rename(tmp_path / "adapter_model.safetensors", file)
        rows = [(file.name, n % 2) for n, file in enumerate(files)]
        labels = write_csv(tmp_path / "l.csv", ("path", "style"), rows)
        assert fit(files, labels=labels).code == 0
        assert fit(f"{tmp_path}/[0-3].*", labels=labels).code == 0
        labels = write_csv(tmp_path / "l.csv", ("path", "style"), [(str(tmp_path), 0), *rows[1:]])
        monkeypatch.chdir(tmp_path)
        code, _, err = fit([files[0].name, *files[1:]], labels=labels)
        assert code == 2
        assert f"no adapter is called '{tmp_path}' (line 2)" in err

    def test_files_that_are_no_safetensors(self, fit, tmp_path, rng, write_csv):
        files = [tmp_path / f"{n}.npz" for n in range(4)]
        for file in files:
            np.savez(file, q_a=rng.normal(size=(2, 4)), q_b=rng.normal(size=(6, 2)))
        rows = [(file.name, n % 2) for n, file in enumerate(files)]
        labels = write_csv(tmp_path / "l.csv", ("path", "style"), rows)
        keys = ("--keys", "{module}_a", "{module}_b", "--scale", "1")
        assert fit(files, *keys, labels=labels).code == 0

    def test_whether_a_file_is_a_packed_zoo_may_not_be_known(self, fit, zoo, monkeypatch):
        """As when it may not be read, which matters only if it has a label."""

        def denied(path):
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr("sklora._zoofile._read_header", denied)
        files = [zoo / f"a{n:02}" / "adapter_model.safetensors" for n in range(40)]
        assert fit(files, labels=zoo / "labels.csv").code == 0

    def test_unknown_row(self, fit, zoo, tmp_path, write_csv):
        labels = write_csv(tmp_path / "l.csv", ("path", "style"), [("a00", 0), ("b", 1)])
        code, out, err = fit(zoo, labels=labels)
        assert (code, out) == (2, "")
        assert err.startswith(f"sklora: error: {labels}: no adapter is called 'b' (line 3); ")

    def test_a_folder_goes_by_no_dots(self, fit, zoo, monkeypatch, write_csv, tmp_path):
        (tmp_path / "a").mkdir()
        monkeypatch.chdir(tmp_path / "a")
        shutil.copytree(zoo / "a00", tmp_path, dirs_exist_ok=True)
        write_csv(tmp_path / "a" / "l.csv", ("path", "style"), [("..", 0), ("b", 1)])
        err = fit("..", labels="l.csv").err
        assert "'..' (line 2), 'b' (line 3); there are 'adapter_model.safetensors'. " in err

    def test_same_file_twice_in_the_zoo(self, fit, zoo, tmp_path, monkeypatch):
        monkeypatch.chdir(zoo.parent)
        shutil.copy(zoo / "labels.csv", tmp_path)  # beside which its names lead nowhere
        for others in ([str(zoo), zoo.name], [f"{zoo}/../{zoo.name}"], [zoo / "a00"]):
            assert fit([zoo, *others], labels=tmp_path / "labels.csv").code == 0
            assert fit([*others, zoo], labels=tmp_path / "labels.csv").code == 0

    def test_packed_zoo(self, fit, zoo, tmp_path, write_csv):
        X = read_adapters(zoo)
        X.save(tmp_path / "zoo.safetensors")
        rows = [(id, "xy"[n % 2]) for n, id in enumerate(X.ids)]
        labels = write_csv(tmp_path / "l.csv", ("path", "style"), rows)
        assert fit(tmp_path / "zoo.safetensors", labels=labels).code == 0
        assert read_model(tmp_path / "model.skops")[1].layout == X.layout
        code, _, err = fit([str(zoo), str(tmp_path / "zoo.safetensors")], labels=labels)
        assert code == 2
        assert f"{tmp_path}/zoo.safetensors is a packed zoo, which goes alone" in err

    def test_rows_in_any_order(self, fit, zoo, tmp_path, write_csv, read_zoos):
        shutil.copytree(zoo, tmp_path / "zoo")
        numbers = [3, 0, 5, 2, 4, 1]
        rows = [(f"a{n:02}", n + 0.5, f"run{n}") for n in numbers]
        labels = write_csv(tmp_path / "l.csv", ("path", "loss", "run"), rows)
        assert fit(tmp_path / "zoo", "--groups", "run", labels=labels, target="loss").code == 0
        shutil.rmtree(tmp_path / "zoo")  # all was read before the training
        np.testing.assert_array_equal(read_zoos[0].loras, read_adapters(zoo)[numbers])
        assert read_zoos[0].targets.y.tolist() == [n + 0.5 for n in numbers]
        assert read_zoos[0].groups == tuple(f"run{n}" for n in numbers)

    def test_rows_of_a_packed_zoo_in_any_order(self, fit, zoo, tmp_path, write_csv, read_zoos):
        X = read_adapters(zoo)
        X = LoRACollection.from_array(X.read(), X.layout, ids=np.arange(100, 140))
        X.save(tmp_path / "zoo.safetensors")
        rows = [(100 + n, n + 0.5) for n in (3, 0, 5, 2, 4, 1)]
        labels = write_csv(tmp_path / "l.csv", ("id", "loss"), rows)
        assert fit(tmp_path / "zoo.safetensors", labels=labels, target="loss").code == 0
        [read] = read_zoos
        assert read.loras.ids.tolist() == [103, 100, 105, 102, 104, 101]
        np.testing.assert_array_equal(read.loras, X[[3, 0, 5, 2, 4, 1]])
        assert read.targets.y.tolist() == [3.5, 0.5, 5.5, 2.5, 4.5, 1.5]


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--architecture", "auto"), "--folds cannot be 0"),
            (("--device", "abacus"), "--device='abacus' is not a device"),
            (("--target", "big"), "--target 'big' is given twice"),
            (("--id", "file"), "has no column 'file'"),
            (("--groups", "file"), "has no column 'file'"),
            (("--target", "loss", "--task", "classification"), "labels of 0 and 1"),
            (("--scale", "inf"), "--scale is inf"),
        ],
    )
    def test_options(self, fit, zoo, options, message):
        code, out, err = fit(zoo, *options, target="big")
        assert (code, out) == (2, "")
        assert message in err

    def test_no_zoo(self, fit, zoo, tmp_path):
        code, _, err = fit(tmp_path / "none", labels=zoo / "labels.csv")
        assert (code, err) == (2, f"sklora: error: {tmp_path}/none: No such file or directory.\n")

    def test_empty_zoo(self, fit, zoo, tmp_path):
        code, _, err = fit(tmp_path, labels=zoo / "labels.csv")
        assert code == 2
        assert f"{tmp_path}: there is no adapter in it" in err

    def test_pipe_in_place_of_a_zoo_is_not_waited_for(self, fit, tmp_path, write_csv, monkeypatch):
        monkeypatch.setattr("sklora._zoofile._read_header", lambda path: pytest.fail("opened"))
        os.mkfifo(tmp_path / "pipe")
        labels = write_csv(tmp_path / "l.csv", ("path", "style"), [("pipe", "a"), ("b", "b")])
        assert fit(tmp_path / "pipe", labels=labels).code == 2

    def test_damaged_packed_zoo(self, fit, zoo, tmp_path):
        read_adapters(zoo).save(tmp_path / "zoo.safetensors")
        data = (tmp_path / "zoo.safetensors").read_bytes()
        assert data.count(b'"weights"') == 1
        (tmp_path / "zoo.safetensors").write_bytes(data.replace(b'"weights"', b'"heights"'))
        code, _, err = fit(tmp_path / "zoo.safetensors", labels=zoo / "labels.csv")
        assert code == 1
        assert "is damaged" in err

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("", "is a folder; name a file in it"),
            ("new/", "is a folder; name a file in it"),
            ("no/m.skops", "no folder"),
            (f"{'m' * 250}.skops", "File name too long; name another."),
        ],
    )
    def test_output(self, run, zoo, tmp_path, name, why):
        labels = ("--labels", zoo / "labels.csv", "--target", "style")
        code, _, err = run("fit", zoo, *labels, "-o", f"{tmp_path}/{name}")
        assert code == 2
        assert why in err

    def test_output_in_a_folder_that_may_not_be_written_to(self, fit, zoo, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        code, out, err = fit(zoo)
        assert (code, out) == (2, "")
        assert f"there is no permission to write to '{tmp_path}'." in err

    def test_output_that_is_a_link_into_no_folder(self, fit, zoo, tmp_path):
        os.symlink(tmp_path / "none" / "m.skops", tmp_path / "model.skops")
        code, _, err = fit(zoo)
        assert code == 2
        assert (
            f"{tmp_path}/model.skops: there is no folder '{tmp_path}/none'; make it first." in err
        )

    def test_output_without_a_name(self, run, zoo):
        """As an unset variable of a shell gives it."""
        labels = ("--labels", zoo / "labels.csv", "--target", "style")
        assert run("fit", zoo, *labels, "-o", "") == (
            2,
            "",
            "sklora: error: the name of the output is empty; name a file.\n",
        )

    @pytest.mark.parametrize("command", ["fit", "compare"])
    def test_output_that_is_a_pipe_or_device_is_not_replaced(self, run, zoo, tmp_path, command):
        path = tmp_path / "pipe.png"
        os.mkfifo(path)
        labels = ("--labels", zoo / "labels.csv", "--target", "style")
        code, out, err = run(command, zoo, *labels, "-o", path)
        assert (code, out) == (2, "")
        assert f"{path} is no regular file" in err
        assert path.is_fifo()

    def test_two_columns_of_one_name(self, fit, zoo, tmp_path, write_csv):
        rows = [(f"a{n:02}", n + 0.5) for n in range(6)]
        labels = write_csv(tmp_path / "l.csv", ("path", "error"), rows)
        code, out, err = fit(zoo, "--folds", "2", labels=labels, target="error")
        assert (code, out) == (2, "")
        assert "predict would write two columns 'error'" in err
        assert "training" not in err

    @pytest.mark.parametrize(("cut", "why"), [(9, "it is cut off"), (8, "has NaN")])
    def test_bad_adapters_are_all_named(self, fit, tmp_path, factors, write_csv, cut, why):
        for n in range(4):
            write_adapter(tmp_path / "zoo" / str(n), factors())
        rows = [(str(n), n % 2) for n in range(4)]
        labels = write_csv(tmp_path / "l.csv", ("path", "style"), rows)
        paths = [tmp_path / "zoo" / str(n) / "adapter_model.safetensors" for n in (1, 2)]
        said = []
        for path in paths:
            nan = b"" if cut == 9 else np.float64("nan").tobytes()
            path.write_bytes(path.read_bytes()[:-cut] + nan)
            code, out, err = fit(tmp_path / "zoo", labels=labels)
            assert (code, out) == (1, "")
            said.append(err)
        assert f"sklora: error: {paths[0]}: " in said[0]
        assert all(f"sklora: {path}: " in said[1] for path in paths)
        assert all(why in line for line in said[1].splitlines() if "adapter_model" in line)
        assert said[1].endswith(
            "sklora: error: 2 adapters cannot be read; mend them, or leave their labels out.\n"
        )

    def test_bad_adapter_without_a_label_is_not_read(self, fit, tmp_path, factors, write_csv):
        for n in range(5):
            write_adapter(tmp_path / "zoo" / str(n), factors())
        path = tmp_path / "zoo" / "4" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
        os.symlink(tmp_path / "zoo" / "none", tmp_path / "zoo" / "broken.safetensors")
        rows = [(str(n), n % 2) for n in range(4)]
        labels = write_csv(tmp_path / "l.csv", ("path", "style"), rows)
        code, _, err = fit(tmp_path / "zoo", labels=labels)
        assert code == 0
        some = f"{tmp_path}/zoo/broken.safetensors, {path}"
        assert f"left out, for want of a label: 2 of 6 adapters, {some}\n" in err

    def test_other_base_model(self, fit, tmp_path, factors, write_csv):
        for n in range(4):
            write_adapter(tmp_path / "zoo" / str(n), factors(), base_model=f"base{n % 2}")
        rows = [(str(n), n % 2) for n in range(4)]
        labels = write_csv(tmp_path / "l.csv", ("path", "style"), rows)
        code, _, err = fit(tmp_path / "zoo", labels=labels)
        assert code == 1
        assert "'base1'" in err
        assert "--allow-other-base-model" in err
        assert fit(tmp_path / "zoo", "--allow-other-base-model", labels=labels).code == 0
        assert read_model(tmp_path / "model.skops")[1].layout.base_model is None

    def test_without_skops(self, fit, zoo, monkeypatch):
        monkeypatch.setitem(sys.modules, "skops.io", None)
        code, _, err = fit(zoo)
        assert code == 2
        assert "pip install 'sklora[secure]'" in err

    def test_nothing_is_left_of_a_failed_save(self, fit, zoo, tmp_path, monkeypatch):
        (tmp_path / "model.skops").write_text("old")

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        code, _, err = fit(zoo)
        assert code == 1
        assert "No space left" in err
        assert (tmp_path / "model.skops").read_text() == "old"
        assert os.listdir(tmp_path) == ["model.skops"]


def test_optional_parts(factors):
    adapters = [factors(), factors(shapes={"layers.0.q_proj": (6, 4)})]
    side = [{"always": [0, 1], "seldom": [0, 0]}, {"always": [2, 0], "seldom": [1, 1]}]
    X = LoRACollection.from_factors(adapters, side=side)
    assert optional_parts(X) == ("layers.0.v_proj", "seldom")


def test_what_fits_in_half_of_the_memory_is_read_at_once(random_loras, rng, monkeypatch):
    X = random_loras(rng)
    flat = np.zeros(X.shape, np.float32)
    X = LoRACollection.from_array(flat, X.layout, ranks=X.ranks, ids=list("abcdefgh"))
    monkeypatch.setattr("sklora.cli._zoo.available_memory", lambda: 2 * X.nbytes - 1)
    assert _in_memory(X) is X
    for available in (2 * X.nbytes, None):
        monkeypatch.setattr("sklora.cli._zoo.available_memory", lambda known=available: known)
        read = _in_memory(X)
        assert read is not X
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read.ranks, X.ranks)
        np.testing.assert_array_equal(read.ids, X.ids)


def test_larger_than_memory_stays_in_files(fit, zoo, monkeypatch):
    monkeypatch.setattr("sklora.cli._zoo.available_memory", lambda: 1)
    assert fit(zoo).code == 0
