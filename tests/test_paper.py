"""The scripts behind the paper's tables: each runs in quick mode, and their protocol is honest."""

import importlib
import itertools
import json
import math
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.utils import Bunch

from sklora.datasets import _code, _digits, _varied, load_digits_loras

PAPER = Path(__file__).parents[1] / "examples" / "paper"
SCRIPTS = sorted(path.stem for path in PAPER.glob("*.py") if path.stem != "protocol")
# Drawn by another test, too.
SLOW = ("figure4",)
# Many questions like those of others: of every architecture one candidate and one seed will do.
LONG = ("appendix_e", "table3", "table4")
FIVE = ("mlp", "o-align", "svd", "dense", "gl-net", "gl-net, spectrum")
BY_RANK = ("svd", "dense", "gl-net", "gl-net, spectrum")
REGRESSION = {"R2", "Kendall's tau", "Spearman's rho"}
ATTRIBUTES = {"accuracy", "loop", "symmetric", "thick", "slanted", "wide"}
SUMS = {
    *("class sum", "equation 38", "beyond equation 38"),
    *("with a rate for each class", "presence"),
}
DIGIT = ("(digit alone)",)
RECOVERED = ("vote of the modules", "all modules at once")
EDITED = (
    *("without the class", "moved, rank 4", "moved, rank 16"),
    *("moved at random, rank 4", "moved at random, rank 16", "with the class"),
)
EFFECTS = {
    *("said to have the class", "samples of the class"),
    *("loss of the class", "loss of the others"),
}
# What is asked, of which models, by which scores.
EXPECTED = {
    "table2": {"score of the samples": ((*FIVE, "gl-net, mean head"), REGRESSION)},
    "table3": {
        "attributes, sets shared by the parts": (FIVE, ATTRIBUTES),
        "attributes, sets shared by the parts, by the digit alone": (DIGIT, ATTRIBUTES),
        "attributes, sets shared by the parts, beyond the digit": (FIVE, {"accuracy"}),
        "attributes, every set in one part": (FIVE, ATTRIBUTES),
        "attributes, every set in one part, by the digit alone": (DIGIT, ATTRIBUTES),
        "attributes, every set in one part, beyond the digit": (FIVE, {"accuracy"}),
        "classes, rank 4": (FIVE, {"accuracy"}),
        "classes, rank 32": (FIVE, {"accuracy"}),
    },
    "table4": {
        f"{asked}, rank {rank}": (FIVE, scores)
        for rank in (4, 32)
        for asked, scores in (
            ("size", {"accuracy"}),
            ("classes", {"accuracy"}),
            ("size as the number of predicted classes", SUMS),
        )
    },
    "table5": {
        "sources": (FIVE, {"accuracy"}),
        "validation loss": (FIVE, REGRESSION),
        "next-token accuracy": (FIVE, REGRESSION),
    },
    "appendix_e": {f"classes, {method}": (FIVE, {"accuracy"}) for method in ("dora", "lokr")},
    "figure4": {
        "attributes": (BY_RANK, {f"accuracy, rank {rank}" for rank in (1, 4, 8)}),
        "accuracy lost from rank 4": (BY_RANK, {f"rank {rank}" for rank in (1, 4, 8)}),
    },
    "salama": {
        f"size, rank {rank}": (RECOVERED, {"accuracy", "error in images"}) for rank in (4, 32)
    },
    "dravid": {"edits": (EDITED, EFFECTS)},
}


@pytest.fixture(scope="module")
def paper():
    """Give the scripts as modules; each tiny zoo is trained once, and briefly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PAPER)
        modules = {name: importlib.import_module(name) for name in ("protocol", *SCRIPTS)}
        patch.setattr(_digits, "N_BASE_STEPS", 50)
        patch.setattr(_code, "BASE_STEPS_PER_DIM", 4)
        patch.setitem(_digits.FIXED, "n_steps", 20)
        patch.setitem(_varied.VARIED, "n_steps", (10, 20))
        patch.setitem(_code.VARIED, "n_epochs", (1,))
        patch.setitem(_code.VARIED, "batch_size", (32,))
        patch.setattr(modules["protocol"], "N_BOOTSTRAP", 5)
        patch.setattr(modules["dravid"], "N_EDITED", 4)
        tiny = modules["protocol"].TINY
        patch.setattr(modules["protocol"], "TINY", {name: cache(tiny[name]) for name in tiny})
        yield SimpleNamespace(**modules)
        for name in modules:
            del sys.modules[name]


@pytest.fixture
def quick(paper):
    """Give a run in quick mode."""
    return paper.protocol.Run(paper.protocol.parser("test").parse_args(["--quick"]))


def some_loras(n_adapters):
    """Give the first adapters of the bundled zoo."""
    zoo = load_digits_loras()
    return zoo.data[:n_adapters], zoo.presence[:n_adapters], zoo.loss[:n_adapters]


def test_every_script_has_expectations():
    assert set(EXPECTED) == set(SCRIPTS)


@pytest.fixture
def briefly(paper, monkeypatch):
    """Try one candidate of every architecture, from one seed."""
    monkeypatch.setitem(paper.protocol.QUICK, "seeds", (0,))
    for key, one in paper.protocol.ARCHITECTURES.items():
        few = one._replace(candidates=one.candidates[:1])
        monkeypatch.setitem(paper.protocol.ARCHITECTURES, key, few)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SCRIPTS]
)
def test_a_script_runs_and_reports_every_score(paper, name, tmp_path, capsys, request):
    if name in LONG:
        request.getfixturevalue("briefly")
    output, chart = tmp_path / "results.json", tmp_path / "chart.svg"
    more = ["--plot", str(chart)] if name == "figure4" else []
    report = getattr(paper, name).main(["--quick", "--output", str(output), *more])
    assert chart.exists() == (name == "figure4")
    assert json.loads(output.read_text())["results"] == json.loads(json.dumps(report["results"]))
    assert report["seconds"] > 0
    assert 0 < report["peak_memory_gb"] < 6
    assert list(report["results"]) == list(EXPECTED[name])
    printed = capsys.readouterr().out
    for title, (models, scores) in EXPECTED[name].items():
        answers = report["results"][title]["answers"]
        assert set(models) <= set(answers) <= {"(blind)", *models}
        assert f"### {title}\n" in printed
        for model, answer in answers.items():
            assert f"| {model} |" in printed
            assert set(answer["mean"]) == set(answer["standard_error"]) == scores
            assert all(
                map(math.isfinite, [*answer["mean"].values(), *answer["standard_error"].values()])
            )
    if name == "table5":
        # The strength of its training shows in any adapter.
        answers = report["results"]["validation loss"]["answers"]
        assert max(answers[model]["mean"]["Kendall's tau"] for model in FIVE) > 0.3
    if name == "dravid":
        means = {model: answers[model]["mean"]["said to have the class"] for model in EDITED}
        assert means["moved, rank 16"] > means["moved at random, rank 16"] + 0.2


def test_an_output_that_cannot_be_written_is_refused_before_the_work(paper, tmp_path):
    command = ["--quick", "--output", str(tmp_path / "missing" / "results.json")]
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        paper.protocol.Run(paper.protocol.parser("test").parse_args(command))


def test_a_chart_that_cannot_be_drawn_costs_no_numbers(paper, briefly, tmp_path):
    output, chart = tmp_path / "results.json", tmp_path / "missing" / "chart.svg"
    with pytest.raises(FileNotFoundError, match=r"chart\.svg"):
        paper.figure4.main(["--quick", "--output", str(output), "--plot", str(chart)])
    assert "attributes" in json.loads(output.read_text())["results"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_how_it_is_run(paper, name):
    assert f"python examples/paper/{name}.py" in getattr(paper, name).__doc__


def test_a_split_is_fixed_and_uses_every_adapter_once(paper):
    rows = paper.protocol.split(200)
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(200))
    np.testing.assert_allclose([len(part) for part in rows], [140, 30, 30], atol=1)
    for part, again in zip(rows, paper.protocol.split(200), strict=True):
        np.testing.assert_array_equal(part, again)


def test_groups_stay_together(paper):
    groups = np.arange(300) % 100
    parts = [set(groups[part]) for part in paper.protocol.split(300, groups)]
    assert set.union(*parts) == set(range(100))
    assert not any(a & b for a, b in itertools.combinations(parts, 2))
    alone = [set(groups[part]) for part in paper.protocol.split(300)]
    assert any(a & b for a, b in itertools.combinations(alone, 2))


def test_test_targets_change_nothing_but_scores(paper, quick):
    X, presence, _ = some_loras(40)
    rows = paper.protocol.split(40)
    other = presence.copy()
    other[rows.test] = 1 - other[rows.test]
    found, scrambled = (
        quick.ask(
            paper.protocol.Question(
                "test", X, y, paper.protocol.labels(), architectures=("svd", "gl-net")
            )
        )
        for y in (presence, other)
    )
    for name, answer in found.items():
        assert answer.chosen == scrambled[name].chosen
        assert answer.validation == scrambled[name].validation
        for one, same in zip(answer.predictions, scrambled[name].predictions, strict=True):
            np.testing.assert_array_equal(one[""], same[""])
        np.testing.assert_allclose(
            answer.scores["accuracy"], 1 - np.array(scrambled[name].scores["accuracy"])
        )


def test_validation_rows_choose(paper, quick, monkeypatch):
    X, _, loss = some_loras(200)
    good, bad = {"lr": 3e-3}, {"lr": 1e-9}
    svd = paper.protocol.ARCHITECTURES["svd"]
    monkeypatch.setitem(
        paper.protocol.ARCHITECTURES, "svd", svd._replace(candidates=(bad, good, bad))
    )
    monkeypatch.setitem(paper.protocol.QUICK, "max_epochs", 20)
    metrics = paper.protocol.REGRESSION
    question = paper.protocol.Question(
        "test", X, loss, metrics, task="regression", architectures=("svd",)
    )
    answers = quick.ask(question)
    assert answers["svd"].chosen == good
    assert min(answers["svd"].scores["R2"]) > 0.1 > answers["(blind)"].scores["R2"][0]


@pytest.mark.slow
def test_networks_trained_at_once_are_the_same(paper):
    X, presence, _ = some_loras(60)
    question = paper.protocol.Question(
        "test", X, presence, paper.protocol.labels(), architectures=("svd", "gl-net")
    )
    parser = paper.protocol.parser("test")
    alone, together = (
        paper.protocol.Run(parser.parse_args(["--quick", "--n-jobs", n])) for n in "12"
    )
    others = together.ask(question)
    for name, answer in alone.ask(question).items():
        np.testing.assert_allclose(answer.scores["accuracy"], others[name].scores["accuracy"])
    assert together.finish()["peak_memory_gb"] > alone.finish()["peak_memory_gb"]


def test_a_constant_has_no_rank_correlation(paper):
    y, constant = np.arange(5.0), np.ones(5)
    scores = {name: metric(y, constant) for name, metric in paper.protocol.REGRESSION.items()}
    assert scores == {"R2": pytest.approx(-0.5), "Kendall's tau": 0.0, "Spearman's rho": 0.0}
    assert all(metric(y, y) == pytest.approx(1) for metric in paper.protocol.REGRESSION.values())


def test_the_bootstrap_draws_groups(paper, rng, monkeypatch):
    monkeypatch.setattr(paper.protocol, "N_BOOTSTRAP", 200)
    right = rng.random(400) < 0.7
    predictions, truth = right.astype(int), np.ones(400, dtype=int)

    def error(groups, *predictions):
        test = paper.protocol.TestSet(None, truth, groups)
        return paper.protocol.bootstrap(test, predictions, paper.protocol.label_accuracy)

    binomial = np.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert error(np.arange(400), predictions) == pytest.approx(binomial, rel=0.2)
    # Groups that are right or wrong as one are as few adapters as there are groups.
    together = np.repeat(rng.random(20) < 0.7, 20).astype(int)
    assert error(np.repeat(np.arange(20), 20), together) > 2 * error(np.arange(400), together)


@pytest.mark.parametrize(("mean", "within"), [(0.79, True), (0.6, False), (0.9, True)])
def test_the_verdict_is_one_standard_error_of_the_best(paper, mean, within):
    Answer = paper.protocol.Answer
    answers = {
        "(blind)": Answer(scores={"accuracy": [1.0]}),
        "svd": Answer(scores={"accuracy": [0.75, 0.85]}),
        "dense": Answer(scores={"accuracy": [0.5, 0.5]}),
        "gl-net, spectrum": Answer(scores={"accuracy": [mean, mean]}),
    }
    verdict = paper.protocol.compare(answers, "accuracy")
    assert verdict == {
        "best other": "svd",
        "difference": pytest.approx(mean - 0.8),
        "within": within,
    }


def test_the_digit_alone_tells_what_goes_with_it(paper):
    digit = np.arange(400) % 10
    y = np.stack([digit < 5, np.arange(400) % 3 == 0], axis=1).astype(int)
    metrics = paper.protocol.labels(["of the digit", "other"])
    question = paper.protocol.Question("test", np.empty((400, 0)), y, metrics)
    answer = paper.table3.by_digit(question, digit)
    rows = question.rows
    assert answer.scores["of the digit"] == [1.0]
    assert answer.scores["other"] == [1 - y[rows.test, 1].mean()]
    assert answer.test_errors["accuracy"] > 0
    # It is learnt from the training rows.
    y[rows.train, 0] = 1 - y[rows.train, 0]
    assert paper.table3.by_digit(question, digit).scores["of the digit"] == [0.0]


@pytest.mark.parametrize("p", [0.5, 0.8, 1.0])
def test_equation_38_counts_every_pattern_of_errors(paper, p):
    sizes, n_classes = [1, 3, 4], 4
    expected = []
    for size in sizes:
        truth = np.arange(n_classes) < size
        chance = 0.0
        for wrong in itertools.product([False, True], repeat=n_classes):
            if np.sum(truth ^ wrong) == size:
                chance += np.prod(np.where(wrong, 1 - p, p))
        expected.append(chance)
    assert paper.table4.count_accuracy(p, sizes, n_classes) == pytest.approx(np.mean(expected))


def test_equation_38_gives_what_the_paper_found(paper):
    # GL-net is right on .904 of the classes in its table 3, and on .468 +- .021 of the sizes in its
    # table 4: "approximately as well as expected" of who counts classes, in section 5.2.2.
    sizes = [sum(classes) for classes in itertools.product((0, 1), repeat=10) if any(classes)]
    assert paper.table4.count_accuracy(0.904, sizes) == pytest.approx(0.468, abs=0.021)


def test_rates_for_each_class_count_every_pattern_of_errors(paper, rng):
    presence, wrong = rng.integers(2, size=(3, 4)), rng.random((3, 4))
    expected = []
    for truth, rates in zip(presence == 1, wrong, strict=True):
        expected.append(
            sum(
                np.prod(np.where(errors, rates, 1 - rates))
                for errors in itertools.product([False, True], repeat=4)
                if np.sum(truth ^ errors) == truth.sum()
            )
        )
    found = paper.table4.count_accuracy_by_class(presence, wrong)
    assert found == pytest.approx(np.mean(expected))
    # Where all rates are one, they are equation 38.
    sizes = presence.sum(axis=1)
    found = paper.table4.count_accuracy_by_class(presence, np.full((3, 4), 0.3))
    assert found == pytest.approx(paper.table4.count_accuracy(0.7, sizes, 4))


def test_equation_38_holds_where_errors_are_independent(paper, rng):
    presence = rng.integers(2, size=(20_000, 10))
    predicted = np.where(rng.random(presence.shape) < 0.15, 1 - presence, presence)
    found = {name: metric(presence, predicted) for name, metric in paper.table4.METRICS.items()}
    assert found["presence"] == pytest.approx(0.85, abs=0.005)
    assert found["beyond equation 38"] == pytest.approx(0, abs=0.01)
    for expected in ("equation 38", "with a rate for each class"):
        assert found["class sum"] == pytest.approx(found[expected], abs=0.01)


def test_what_is_beyond_equation_38_has_an_error_of_the_test_sets(paper, rng):
    y = rng.integers(2, size=(300, 10))
    # Every miss has its false alarm: each adapter has the number of classes that it has.
    balanced = np.stack([rng.permutation(row) for row in y])
    chance = np.where(rng.random(y.shape) < 0.15, 1 - y, y)
    test = paper.protocol.TestSet(None, y, np.arange(300) // 2)
    answers = {
        name: paper.protocol.Answer(predictions=[{"": found}] * 2)
        for name, found in (("balanced", balanced), ("chance", chance))
    }
    counted = paper.table4.strategy(SimpleNamespace(test_sets={"": test}), answers)
    assert counted["balanced"].scores["class sum"] == [1.0, 1.0]
    assert counted["balanced"].test_errors["class sum"] == 0
    for name, least, most in (("balanced", 10, np.inf), ("chance", 0, 5)):
        [beyond, _] = counted[name].scores["beyond equation 38"]
        assert least <= abs(beyond) / counted[name].test_errors["beyond equation 38"] < most


def test_every_rank_is_tested_on_the_same_sets(paper):
    zoos = {
        rank: Bunch(data=X[:n], attributes=np.eye(12)[:n], groups=np.arange(12)[:n] % 4)
        for (rank, n), (X, _, _) in zip({1: 6, 4: 12}.items(), [some_loras(12)] * 2, strict=True)
    }
    tests = paper.figure4.test_sets(zoos, held_out=np.array([1, 3]))
    assert list(tests) == ["rank 1", "rank 4"]
    for X, y, groups in tests.values():
        np.testing.assert_array_equal(groups, [1, 3, 1])
        np.testing.assert_array_equal(y, np.eye(12)[[1, 3, 5]])
        np.testing.assert_array_equal(X.ids, zoos[4].data.ids[[1, 3, 5]])


def test_what_is_beyond_the_digit_is_paired(paper):
    y, groups = np.zeros((6, 2)), np.repeat(np.arange(3), 2)
    known = y.copy()
    known[::2, 0] = 1  # one label of one adapter in every group
    test = paper.protocol.TestSet(None, y, groups)
    question = SimpleNamespace(test_sets={"": test})
    answers = {
        name: paper.protocol.Answer(predictions=[{"": found}] * n)
        for name, found, n in (("svd", y, 2), ("(digit alone)", known, 1))
    }
    beyond = paper.table3.beyond(question, answers, answers["(digit alone)"])
    assert beyond["svd"].scores == {"accuracy": [0.25, 0.25]}
    assert beyond["(digit alone)"].scores == {"accuracy": [0.0]}
    assert {answer.test_errors["accuracy"] for answer in beyond.values()} == {0.0}


def test_what_is_lost_between_ranks_is_paired(paper):
    y, groups = np.zeros((6, 2)), np.repeat(np.arange(3), 2)
    tests = {f"rank {rank}": paper.protocol.TestSet(None, y, groups) for rank in (1, 4)}
    wrong = y.copy()
    wrong[::2, 0] = 1  # one label of one adapter in every group
    answer = paper.protocol.Answer(predictions=[{"rank 1": wrong, "rank 4": y}] * 2)
    lost = paper.figure4.lost_accuracy(SimpleNamespace(test_sets=tests), {"svd": answer})["svd"]
    assert lost.scores == {"rank 1": [0.25, 0.25], "rank 4": [0.0, 0.0]}
    assert lost.test_errors == {"rank 1": 0.0, "rank 4": 0.0}


def test_neighbours_recover_sizes(paper):
    zoo = load_digits_loras()
    true = zoo.size[paper.protocol.split(len(zoo.data), zoo.groups).test]
    right = {name: np.mean(found == true) for name, found in paper.salama.recover(zoo).items()}
    assert min(right[name] for name in RECOVERED) > right["(blind)"] + 0.05


def test_adapters_of_one_set_are_one_sample(paper):
    assert paper.salama.by_set(np.array([1, 0, 3, 5]), np.array([7, 2, 7, 2])) == [2.5, 2.0]


def test_updates_come_back_as_adapters(paper):
    X, _, _ = some_loras(5)
    updates = paper.dravid.dense(X)
    np.testing.assert_allclose(
        paper.dravid.dense(paper.dravid.low_rank(updates, X.layout, 4)), updates, atol=1e-5
    )
    lower = paper.dravid.low_rank(updates, X.layout, 2)
    assert (lower.ranks == 2).all()
    lost = np.linalg.norm(paper.dravid.dense(lower) - updates) / np.linalg.norm(updates)
    assert 1e-3 < lost < 0.9


def test_an_edit_moves_an_adapter_to_its_place(paper):
    X, presence, _ = some_loras(60)
    updates = paper.dravid.dense(X)
    space = paper.dravid.fit(updates[:40], presence[:40], 16)
    moved = updates[40:] + space.to_plane(updates[40:], 3, 0.9)
    np.testing.assert_allclose(space.scores(moved)[:, 3], 0.9, atol=1e-3)
