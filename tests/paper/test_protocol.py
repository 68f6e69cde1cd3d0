"""How the tables are made is honest: their splits, choices, errors and scores."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from sklora import OAlign


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


def test_test_targets_change_nothing_but_scores(paper, some_loras, quick):
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


def test_validation_rows_choose(paper, some_loras, quick, monkeypatch):
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
    assert answers["svd"].test_errors == question.test_errors(answers["svd"].predictions)
    [blind] = answers["(blind)"].predictions
    np.testing.assert_allclose(blind[""], loss[question.rows.train].mean())


@pytest.mark.slow
def test_networks_trained_at_once_are_the_same(paper, some_loras):
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


def test_the_two_rank_correlations(paper):
    found = {name: f(np.arange(3), [0, 2, 1]) for name, f in paper.protocol.REGRESSION.items()}
    assert found == pytest.approx({"R2": 0, "Kendall's tau": 1 / 3, "Spearman's rho": 1 / 2})


def test_the_standard_error_is_that_of_the_mean(paper):
    assert paper.protocol.standard_error([1, 3]) == pytest.approx(1)
    assert paper.protocol.standard_error([1]) == 0


def test_the_bootstrap_draws_groups(paper, rng, monkeypatch):
    monkeypatch.setattr(paper.protocol, "N_BOOTSTRAP", 200)
    right = rng.random(400) < 0.7
    predictions, truth = right.astype(int), np.ones(400, dtype=int)

    def error(groups, *predictions):
        test = paper.protocol.TestSet(None, truth, groups)
        return paper.protocol.bootstrap(test, predictions, paper.protocol.label_accuracy)

    binomial = np.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert error(np.arange(400), predictions) == pytest.approx(binomial, rel=0.2)
    # Of several seeds it is the error of their mean, which here is 1/2 whatever is drawn.
    assert error(np.arange(400), predictions, 1 - predictions) == pytest.approx(0)
    test = paper.protocol.TestSet(None, truth[:, None], np.arange(400))
    pairs = [predictions[:, None], 1 - predictions[:, None]], [np.zeros((400, 1))] * 2
    assert paper.protocol.difference(test, *pairs)[1] == pytest.approx(0)
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


def test_a_network_has_its_seed_and_what_its_row_says(paper):
    asked = SimpleNamespace(task="classification")
    for name in paper.protocol.ARCHITECTURES:
        model = paper.protocol.network(asked, name, {"lr": 0.5}, seed=7)
        assert (model.random_state, model.lr) == (7, 0.5)
        if name.startswith("gl-net"):
            assert model.spectrum == (name == "gl-net, spectrum")
            assert model.head == ("mean" if name == "gl-net, mean head" else "flatten")


def test_features_are_fitted_to_the_training_rows(paper, some_loras):
    X, y, _ = some_loras(40)
    question = paper.protocol.Question("test", X, y, paper.protocol.labels())
    found = paper.protocol.features(question, "o-align")
    fitted = OAlign(random_state=0).fit(X[question.rows.train])
    for part, rows in zip(("train", "validation", ""), question.rows, strict=True):
        np.testing.assert_array_equal(found[part].read(), fitted.transform(X[rows]).read())


def test_zoos_are_those_that_are_asked_for(paper, monkeypatch):
    def fetch(rank, **options):
        return rank, options

    monkeypatch.setattr(paper.protocol.datasets, "fetch_digits_loras", fetch)
    command = ["--n-adapters", "500", "--data-home", "here", "--n-jobs", "2"]
    run = paper.protocol.Run(paper.protocol.parser("test").parse_args(command))
    same = {"data_home": "here", "n_jobs": 2}
    assert run.zoo("digits", 32, method="dora") == (
        32,
        same | {"n_adapters": 500, "method": "dora"},
    )
    assert run.zoo("digits", 2, 1000) == (2, same | {"n_adapters": 1000})
