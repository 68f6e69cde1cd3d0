"""What is computed for one table alone is what its page says."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.utils import Bunch

from sklora import SVDSpectrum
from sklora.datasets import load_digits_loras


def test_the_digit_alone_tells_what_goes_with_it(paper):
    digit = np.arange(400) % 10
    y = np.stack([digit % 2, np.arange(400) % 3 == 0], axis=1)
    metrics = paper.protocol.labels(["of the digit", "other"])
    question = paper.protocol.Question("test", np.empty((400, 0)), y, metrics)
    answer = paper.table3.by_digit(question, digit)
    rows = question.rows
    assert answer.scores["of the digit"] == [1.0]
    assert answer.scores["other"] == [1 - y[rows.test, 1].mean()]
    [test], [found] = question.test_sets.values(), answer.predictions
    error = paper.protocol.bootstrap(test, [found[""]], metrics["accuracy"])
    assert answer.test_errors == {"accuracy": error}
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


def test_each_class_has_its_rates_of_misses_and_of_false_alarms(paper):
    # The first class is missed in two of the four adapters that have it; all else is right.
    presence = np.array([[1, 0], [1, 1], [1, 0], [1, 1], [0, 1]])
    predicted = presence.copy()
    predicted[[0, 2], 0] = 0
    assert paper.table4.by_class(presence, predicted) == pytest.approx((4 * 0.5 + 1) / 5)
    expected = paper.table4.count_accuracy(0.8, presence.sum(axis=1), 2)
    assert paper.table4.equation_38(presence, predicted) == pytest.approx(expected)


def test_equation_38_holds_where_errors_are_independent(paper, rng):
    presence = rng.integers(2, size=(20_000, 10))
    predicted = np.where(rng.random(presence.shape) < 0.15, 1 - presence, presence)
    found = {name: metric(presence, predicted) for name, metric in paper.table4.METRICS.items()}
    assert found["presence"] == pytest.approx(0.85, abs=0.005)
    assert found["beyond equation 38"] == found["class sum"] - found["equation 38"]
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


def test_every_rank_is_tested_on_the_same_sets(paper, some_loras):
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


def test_neighbours_are_all_but_the_test_adapters(paper):
    zoo = load_digits_loras()
    rows = paper.protocol.split(len(zoo.data), zoo.groups)
    known = np.concatenate([rows.train, rows.validation])
    spectra = SVDSpectrum().fit_transform(zoo.data)

    def sizes(*columns):
        near = cdist(spectra[rows.test][:, slice(*columns)], spectra[known][:, slice(*columns)])
        return zoo.size[known[near.argmin(axis=1)]]

    found = paper.salama.recover(zoo)
    np.testing.assert_array_equal(found["all modules at once"], sizes(None))
    modules = np.stack([sizes(start, start + 4) for start in range(0, spectra.shape[1], 4)])
    votes = [np.bincount(column).argmax() for column in modules.T]
    np.testing.assert_array_equal(found["vote of the modules"], votes)
    np.testing.assert_array_equal(found["(blind)"], np.bincount(zoo.size[known]).argmax())


def test_sizes_are_recovered_at_both_ranks(paper):
    results = paper.salama.main(["--quick"])["results"]
    for rank in (4, 32):
        zoo = paper.protocol.TINY["digits"](rank)
        test = paper.protocol.split(len(zoo.data), zoo.groups).test
        for name, found in paper.salama.recover(zoo).items():
            scores = results[f"size, rank {rank}"]["answers"][name]["scores"]
            expected = paper.salama.by_set(np.abs(found - zoo.size[test]), zoo.groups[test])
            assert scores["error in images"] == expected


def test_adapters_of_one_set_are_one_sample(paper):
    assert paper.salama.by_set(np.array([1, 0, 3, 5]), np.array([7, 2, 7, 2])) == [2.5, 2.0]


def test_updates_come_back_as_adapters(paper, some_loras):
    X, _, _ = some_loras(5)
    updates = paper.dravid.dense(X)
    np.testing.assert_allclose(
        paper.dravid.dense(paper.dravid.low_rank(updates, X.layout, 4)), updates, atol=1e-5
    )
    lower = paper.dravid.low_rank(updates, X.layout, 2)
    assert (lower.ranks == 2).all()
    lost = np.linalg.norm(paper.dravid.dense(lower) - updates) / np.linalg.norm(updates)
    assert 1e-3 < lost < 0.9


def test_an_edit_moves_an_adapter_to_its_place(paper, some_loras):
    X, presence, _ = some_loras(60)
    updates = paper.dravid.dense(X)
    space = paper.dravid.fit(updates[:40], presence[:40], 16)
    moved = updates[40:] + space.to_plane(updates[40:], 3, 0.9)
    np.testing.assert_allclose(space.scores(moved)[:, 3], 0.9, atol=1e-3)


def test_the_validation_adapters_choose_the_components(paper, monkeypatch):
    rows = paper.protocol.split(60)
    presence, updates = np.ones((60, 1), dtype=int), np.arange(60)[:, None]
    seen = {32: rows.test, 128: rows.validation, 512: rows.train}

    def fit(training, truth, n):
        np.testing.assert_array_equal(training[:, 0], rows.train)
        return SimpleNamespace(n=n, scores=lambda found: np.isin(found, seen[n]) - 0.5)

    monkeypatch.setattr(paper.dravid, "fit", fit)
    assert paper.dravid.choose(updates, presence, rows).n == 128


def test_an_edit_teaches_test_adapters_without_the_class(paper, some_loras, monkeypatch):
    X, presence, _ = some_loras(60)
    rows, updates = paper.protocol.split(60), paper.dravid.dense(X)
    space = paper.dravid.fit(updates[rows.train], presence[rows.train], 16)
    monkeypatch.setattr(paper.dravid, "RANKS", (4, 32))  # the latter cuts nothing
    monkeypatch.setattr(paper.dravid, "measure", lambda space, X, base, label: X)
    zoo = Bunch(data=X, presence=presence, base=None)
    found = paper.dravid.edit(space, zoo, updates, rows, 3)
    has = presence[:, 3] == 1
    plain = rows.test[~has[rows.test]][:4]
    np.testing.assert_array_equal(found["without the class"].ids, X.ids[plain])
    np.testing.assert_array_equal(found["with the class"].ids, X.ids[rows.test[has[rows.test]][:4]])
    place = space.scores(updates[rows.train[has[rows.train]]])[:, 3].mean()
    moved, aside = (
        paper.dravid.dense(found[f"{name}, rank 32"]) for name in ("moved", "moved at random")
    )
    np.testing.assert_allclose(space.scores(moved)[:, 3], place, atol=1e-3)
    lengths = (np.linalg.norm(one - updates[plain], axis=1) for one in (moved, aside))
    np.testing.assert_allclose(*lengths, rtol=1e-2)
    for name in ("moved", "moved at random"):
        assert (found[f"{name}, rank 4"].ranks == 4).all()


def test_an_adapter_is_measured_by_the_class(paper, some_loras, monkeypatch):
    X, *_ = some_loras(2)
    losses = np.array([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]])
    result = Bunch(class_losses=losses, class_probabilities=losses / 10)
    monkeypatch.setattr(paper.dravid, "evaluate_digits_loras", lambda X, base, verbose: result)
    space = SimpleNamespace(scores=lambda updates: np.array([[1, 1, 1], [1, -1, 1]]))
    assert paper.dravid.measure(space, X, {}, 1) == pytest.approx(
        {
            "said to have the class": 0.5,
            "loss of the class": 3,
            "loss of the others": 4.5,
            "samples of the class": 0.3,
        }
    )
