import json
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.dummy import DummyClassifier, DummyRegressor

from sklora import ARCHITECTURES
from sklora.cli import _scoring
from sklora.cli._output import CommandError
from sklora.cli._scoring import Evaluation, Metric, make_folds, make_metric, show_scores
from sklora.cli._targets import Targets
from sklora.cli._zoo import LabelledZoo
from sklora.io._plan import ReadOptions


@pytest.fixture
def compare(run, zoo, tmp_path):
    def compare(*options, target="style"):
        labels = ("--labels", zoo / "labels.csv", "--target", target, "--folds", "2")
        chart = () if "--no-chart" in options else ("-o", tmp_path / "chart.png")
        return run("compare", zoo, *labels, *chart, *options)

    return compare


@pytest.fixture
def quick(monkeypatch):
    """Constants in place of networks."""
    dummies = {"classification": DummyClassifier, "regression": DummyRegressor}

    def make(name, task, **options):
        if name == "dense":
            raise ValueError("too wide")
        return dummies[task]()

    monkeypatch.setattr(_scoring, "make_architecture", make)


def test_table_and_chart(compare, few_epochs, tmp_path):
    code, out, err = compare(target="loss")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert [line[0] for line in lines] == ["architecture", *ARCHITECTURES, "(constant)"]
    assert lines[0][1] == "R2"
    assert all(line[2].startswith("±") for line in lines[1:6])
    assert lines[-1] == ["(constant)", "0.000"]
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert err.endswith("chart.png holds the chart\n")


def test_chart_shows_every_fold(compare, quick, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    _, out, _ = compare("--json")
    [axes] = figures[0].axes
    [times] = axes.child_axes
    assert all(text.get_text().endswith(" s") for text in times.get_yticklabels())
    results = json.loads(out)["results"]
    [folds] = [
        line for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xdata()) == 8
    ]
    assert folds.get_xdata().tolist() == [score for one in results for score in one["scores"]]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        one["architecture"] for one in results
    ]
    assert axes.get_title() == "style"
    assert axes.get_xlabel() == "accuracy"
    assert figures[0].get_suptitle() == "40 adapters, 2 folds"
    assert figures[0].get_size_inches().tolist() == [6.5, pytest.approx(1.6 + 0.4 * 4)]
    assert "constant" in [text.get_text() for text in axes.texts]


def test_chart_of_groups_and_of_names_that_do_not_print(
    run, quick, zoo, tmp_path, monkeypatch, write_csv
):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    rows = [(f"a{n:02}", n % 2, n // 4) for n in range(40)]
    labels = write_csv(tmp_path / "l.csv", ("path", "\x1b[2J", "run"), rows)
    options = ("--target", "\x1b[2J", "--groups", "run", "--folds", "2", "-o", tmp_path / "c.png")
    assert run("compare", zoo, "--labels", labels, *options).code == 1
    assert figures[0].get_suptitle() == "40 adapters, 2 folds by group"
    assert figures[0].axes[0].get_title() == "\\x1b[2J"


def test_json(compare, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = compare("--json", "--no-chart", "--groups", "run")
    summary = json.loads(out)
    assert code == 1
    assert "dense failed: too wide" in err
    assert (summary["metric"], summary["grouped"], summary["constant"]) == ("accuracy", True, 0.5)
    assert (summary["task"], summary["targets"]) == ("classification", ["style"])
    assert (summary["n_adapters"], summary["folds"]) == (40, 2)
    assert [one["architecture"] for one in summary["results"]] == [
        "mlp",
        "o-align",
        "svd",
        "gl-net",
    ]
    assert len(summary["results"][0]["scores"]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("jobs", "n_processes"), [("1", 1), ("9", 2)])
def test_options_reach_what_is_trained_and_its_scores_come_back(
    compare, monkeypatch, jobs, n_processes
):
    models, validations, seeds = [], [], []

    def make(name, task, **options):
        models.append((name, task, options))
        return DummyRegressor()

    def validate(model, X, y, *, cv, **options):
        validations.append(options)
        return {"test_score": np.array([0.25, 0.75]), "fit_time": np.array([1.0, 3.0])}

    monkeypatch.setattr(_scoring, "make_architecture", make)
    monkeypatch.setattr(_scoring, "cross_validate", validate)
    monkeypatch.setattr(
        "sklora.cli._compare.make_folds",
        lambda zoo, *options: seeds.append(options) or make_folds(zoo, *options),
    )
    options = ("--no-chart", "--seed", "3", "--jobs", jobs, "--device", "cpu")
    code, out, _ = compare(*options, "--json", target="loss")
    assert code == 0
    given = {"device": "cpu", "random_state": 3, "verbose": 1}
    assert models == [(name, "regression", given) for name in ARCHITECTURES]
    assert seeds == [(2, 3)]
    assert validations == [{"scoring": "r2", "n_jobs": n_processes, "error_score": "raise"}] * 5
    summary = json.loads(out)
    assert (summary["task"], summary["metric"]) == ("regression", "R2")
    assert (summary["grouped"], summary["constant"]) == (False, 0.0)
    one = summary["results"][2]
    assert (one["architecture"], one["scores"]) == ("svd", [0.25, 0.75])
    assert (one["mean"], one["fit_seconds"]) == (0.5, 2.0)
    assert one["spread"] == pytest.approx(0.125**0.5)


def test_many_labels_of_any_name(compare, quick, run, zoo, tmp_path, write_csv, monkeypatch):
    titles, save = [], Figure.savefig

    def savefig(figure, *arguments, **options):
        titles.append(figure.axes[0].get_title())
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    names = [f"$label_{n}^$" for n in range(8)]
    rows = [(f"a{n:02}", *(n >> bit & 1 for bit in range(8))) for n in range(40)]
    labels = write_csv(tmp_path / "l.csv", ("path", *names), rows)
    targets = [option for name in names for option in ("--target", name)]
    options = ("--labels", labels, *targets, "-o", tmp_path / "chart.svg")
    assert run("compare", zoo, *options).code == 1
    assert (tmp_path / "chart.svg").read_text().startswith("<?xml")
    assert titles[0].endswith(" and 5 more")


def test_without_matplotlib(compare, quick, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    code, out, err = compare()
    assert code == 1  # one of the five fails
    assert "pip install 'sklora[plot]'" in err
    assert out.count("\n") == 6
    assert not (tmp_path / "chart.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "chart.odd"), "chart.odd: a chart's name ends in one of"),
        (("-o", "none/chart.png"), "there is no folder"),
        (("--device", "abacus"), "--device="),
        (("--groups", "none"), "has no column 'none'"),
    ],
)
def test_refused(compare, options, message):
    code, out, err = compare(*options)
    assert (code, out, err.count("\n")) == (2, "", 1)  # before the adapters are read
    assert message in err


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("no"), MemoryError()])
def test_all_fail(compare, monkeypatch, error):
    def make(*arguments, **options):
        raise error

    monkeypatch.setattr(_scoring, "make_architecture", make)
    code, _, err = compare("--no-chart")
    assert code == 1
    assert f"sklora: mlp failed: {str(error) or 'MemoryError'}\n" in err
    assert err.endswith("sklora: error: no architecture could be trained.\n")


def zoo_of(y, task="classification", groups=None):
    y = np.asarray(y)
    return LabelledZoo(range(len(y)), Targets(task, ("y",), y), groups, ReadOptions())


def test_labels_count_one_by_one():
    y = np.array([[1, 0], [1, 1], [1, 0], [1, 0]])
    name, scorer, constant = make_metric(None, zoo_of(y), [])
    always = DummyClassifier(strategy="constant", constant=[1, 0]).fit(np.zeros((4, 1)), y)
    assert (name, scorer(always, np.zeros((4, 1)), y)) == ("accuracy", 0.875)
    assert constant == 0.875


class TestScoring:
    RARE = np.arange(40) % 10 == 0  # four of forty

    @pytest.mark.parametrize(
        ("scoring", "y", "task", "constant"),
        [
            ("average_precision", RARE.astype(int), "classification", 0.1),
            ("balanced_accuracy", np.where(RARE, "bad", "good"), "classification", 0.5),
            ("f1", RARE.astype(int), "classification", 0),
            ("roc_auc", np.arange(40)[:, None] // [1, 2] % 2, "classification", 0.5),
            ("neg_mean_absolute_error", np.arange(40) % 2 * 2.0, "regression", -1),
            ("neg_mean_absolute_error", np.ones((40, 2)), "regression", 0),
        ],
    )
    def test_best_constant_answer(self, scoring, y, task, constant):
        zoo = zoo_of(y, task)
        made = make_metric(scoring, zoo, make_folds(zoo, 4, 0))
        assert (made.name, made.scorer) == (scoring, scoring)
        assert made.constant == pytest.approx(constant, abs=0.02)

    @pytest.mark.parametrize(
        ("scoring", "y", "task", "message"),
        [
            ("f1", ["a", "b"] * 4, "classification", "cannot score this classification: pos_label"),
            ("accuracy", np.arange(8) / 3, "regression", "cannot score this regression: "),
            ("roc_auc", np.arange(8) / 3, "regression", "cannot score this regression: "),
            ("neg_max_error", np.ones((8, 2)), "regression", "cannot score this regression: "),
            ("roc_auc", [1, *[0] * 7], "classification", "roc_auc has no value on one of the"),
        ],
    )
    def test_what_a_score_does_not_take(self, scoring, y, task, message):
        zoo = zoo_of(y, task)
        with pytest.raises(CommandError, match=message):
            make_metric(scoring, zoo, [(np.arange(4), np.arange(4, 8))])

    def test_ranks_architectures_and_is_named(self, compare, quick, monkeypatch):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
        code, out, _ = compare("--scoring", "neg_log_loss", "--json", target="big")
        summary = json.loads(out)
        assert code == 1  # one of the five fails
        assert summary["metric"] == figures[0].axes[0].get_xlabel() == "neg_log_loss"
        assert summary["constant"] == pytest.approx(-np.log(2))
        for one in summary["results"]:
            assert one["scores"] == pytest.approx([-np.log(2)] * 2)


def test_table_of_scores(capsys):
    show_scores([Evaluation("svd", np.array([1.0, 3.0]), 1.26)], Metric("R2", "r2", 0.0))
    assert capsys.readouterr().out.splitlines() == [
        "architecture     R2  spread  fit time",
        "svd           2.000  ±1.414     1.3 s",
        "(constant)    0.000",
    ]


class TestFolds:
    zoo = staticmethod(zoo_of)

    def test_classes_are_spread(self):
        y = np.repeat(["a", "b"], [8, 4])
        for _, test in make_folds(self.zoo(y), 4, 0):
            assert sorted(y[test]) == ["a", "a", "b"]

    def test_groups_are_kept_together(self):
        groups = tuple("aaabbbcccddd")
        for train, test in make_folds(self.zoo(np.arange(12) % 2, groups=groups), 2, 0):
            assert not {groups[n] for n in train} & {groups[n] for n in test}

    def test_one_adapter_alone_in_a_fold_has_no_r2(self):
        groups = tuple("abbbbcccc")
        with pytest.raises(CommandError, match=r"--folds 3 leaves one adapter alone in a fold"):
            make_folds(self.zoo(np.arange(9.0), "regression", groups=groups), 3, 0)
        assert len(make_folds(self.zoo(np.arange(9) % 2, groups=groups), 3, 0)) == 3

    @pytest.mark.parametrize("groups", [None, tuple("cddccc")])
    def test_every_fold_leaves_two_classes_to_train_on(self, groups):
        with pytest.raises(CommandError, match=r"leaves only class [ab] to train on; pass other"):
            make_folds(self.zoo(list("baabbb" if groups else "abbbbb"), groups=groups), 2, 0)

    @pytest.mark.parametrize(
        ("task", "number", "groups", "message"),
        [
            ("classification", 8, "a" * 8, "4 is too many for 1 group; label more groups"),
            ("classification", 8, "aaabbbcc", "4 is too many for 3 groups; pass fewer"),
            ("regression", 3, None, "4 is too many for 3 adapters; label more adapters"),
            ("regression", 4, None, "4 is too many for 4 adapters; pass fewer"),
        ],
    )
    def test_too_many(self, task, number, groups, message):
        zoo = self.zoo(np.arange(number) % 2, task, groups=groups and tuple(groups))
        with pytest.raises(CommandError, match=message):
            make_folds(zoo, 4, 0)

    def test_as_many_as_there_can_be(self, capsys):
        assert len(make_folds(self.zoo(np.arange(8.0), "regression"), 4, 0)) == 4
        pairs = self.zoo(np.arange(8.0), "regression", groups=tuple("aabbccdd"))
        assert len(make_folds(pairs, 4, 0)) == 4
        assert len(make_folds(self.zoo(np.arange(8) % 2), 4, 0)) == 4
        assert len(make_folds(self.zoo(np.arange(8) % 2, groups=tuple("aabbccdd")), 4, 0)) == 4
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("task", ["classification", "regression"])
    def test_seed(self, task):
        zoo = self.zoo(np.arange(20) % 2 if task == "classification" else np.arange(20.0), task)
        first, again, other = (make_folds(zoo, 2, seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first[0][1], again[0][1])
        assert set(first[0][1]) != set(other[0][1])
