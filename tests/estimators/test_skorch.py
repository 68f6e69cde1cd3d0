"""The skorch net that trains an estimator: users' callbacks, and what it prints."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.metrics import get_scorer
from skorch.callbacks import Callback, Checkpoint, EarlyStopping, EpochScoring, Freezer, LRScheduler

from sklora.estimators import MLPNetClassifier, MLPNetRegressor


class Recorder(Callback):
    """Notes what it meets; every record is shared by all copies."""

    records: list[tuple[object, int]]

    def __init__(self, records):
        self.records = records
        self.epochs = 0

    def __deepcopy__(self, memo):
        return type(self)(self.records)

    def on_epoch_end(self, net, **kwargs):
        self.epochs += 1
        self.records.append((self, len(net.history)))


class BatchRecorder(Recorder):
    def on_batch_begin(self, net, batch, training, **kwargs):
        self.records.append((net.history[-1]["epoch"], batch[1]))


def test_rows_come_in_another_order_in_every_epoch(rng):
    records, X = [], rng.normal(size=(12, 3))
    options = {"max_epochs": 2, "batch_size": 6, "callbacks": [BatchRecorder(records)]}
    MLPNetRegressor(**options, device="cpu", random_state=0).fit(X, np.arange(12.0))
    first, second = (
        np.concatenate([np.ravel(y) for n, y in records if n == epoch]) for epoch in (1, 2)
    )
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.sort(first), np.sort(second))
    assert len(set(first)) == 12


class TestCallbacks:
    def test_are_called_and_copied(self, case, zoo, quick):
        records = []
        recorder, other = Recorder(records), Recorder(records)
        model = quick(case[0], callbacks=[recorder, ("named", other)])
        model.fit(zoo, case[1]).fit(zoo, case[1])
        assert recorder.epochs == other.epochs == 0
        assert len({id(callback) for callback, _ in records}) == 4
        assert [epoch for _, epoch in records] == [1, 1, 2, 2, 3, 3] * 2
        assert model.callbacks == [recorder, ("named", other)]

    def test_clone_keeps_them(self, case, zoo, quick):
        model = quick(case[0], callbacks=[EarlyStopping(patience=7)])
        twin = clone(model.fit(zoo, case[1]))
        assert twin.callbacks[0].patience == 7
        assert twin.callbacks[0] is not model.callbacks[0]

    def test_may_stop_the_training(self, case, zoo, quick):
        stop = EarlyStopping("train_loss", patience=2, threshold=10.0, threshold_mode="abs")
        model = quick(case[0], max_epochs=20, callbacks=[stop]).fit(zoo, case[1])
        assert model.n_iter_ == 3

    @pytest.mark.parametrize("named", [False, True])
    def test_may_set_the_learning_rate(self, named, case, zoo, quick):
        steps = LRScheduler("StepLR", step_size=2, gamma=0.1)
        callbacks = [("steps", steps) if named else steps, Callback()]
        model = quick(case[0], max_epochs=4, lr=0.1, callbacks=callbacks, early_stopping=False)
        rates = [epoch["event_lr"] for epoch in model.fit(zoo, case[1]).history_]
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01])

    def test_find_the_network_by_name(self, case, zoo, quick):
        model = quick(case[0], callbacks=[Freezer("net.mlp.0.*")], early_stopping=False)
        other = clone(model).set_params(max_epochs=1)
        weights, others = model.fit(zoo, case[1]).weights_, other.fit(zoo, case[1]).weights_
        same = {name for name in weights if np.array_equal(weights[name], others[name])}
        assert {name for name in same if "mlp" in name} == {"mlp.0.weight", "mlp.0.bias"}

    def test_score_with_sklearn_scorers(self, zoo, targets, quick, classifier, regressor):
        for estimator, y, scoring in (
            (classifier, targets["multiclass"], "accuracy"),
            (classifier, targets["multiclass"], "neg_log_loss"),
            (classifier, targets["multilabel"], "average_precision"),
            (classifier, targets["multilabel"], "f1_macro"),
            (regressor, targets["single"], "neg_mean_squared_error"),
        ):
            scorer = EpochScoring(scoring, name="score", lower_is_better=False)
            model = quick(estimator, callbacks=[scorer]).fit(zoo, y)
            assert all("score" in epoch for epoch in model.history_)

    @pytest.mark.parametrize(
        ("kind", "scoring"),
        [
            ("multiclass", "neg_log_loss"),
            ("multilabel", "f1_macro"),
            ("single", "r2"),
        ],
    )
    def test_scores_are_those_of_the_estimator(self, kind, scoring, zoo, targets, quick):
        scorer = EpochScoring(scoring, name="score", lower_is_better=False, on_train=True)
        estimator = MLPNetRegressor if kind == "single" else MLPNetClassifier
        # Scored are the outputs of the training batches, which hardly change the weights.
        model = quick(estimator, callbacks=[scorer], early_stopping=False, lr=1e-9)
        model.fit(zoo, targets[kind])
        expected = get_scorer(scoring)(model, zoo, targets[kind])
        assert model.history_[-1]["score"] == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("verbose", [0, 2])
    def test_may_watch_the_accuracy(self, verbose, zoo, targets, quick):
        stop = EarlyStopping("valid_acc", patience=2, threshold=10, lower_is_better=False)
        model = quick(MLPNetClassifier, max_epochs=20, callbacks=[stop], verbose=verbose)
        model.fit(zoo, targets["multiclass"])
        assert [epoch["valid_acc"] > 0 for epoch in model.history_] == [True] * model.n_iter_
        assert model.n_iter_ < 20

    @pytest.mark.parametrize(
        "callback",
        [EarlyStopping(), ("named", EarlyStopping("valid_acc")), Checkpoint(dirname="nowhere")],
    )
    def test_cannot_watch_adapters_that_are_not_held_out(self, callback, case, zoo, quick):
        model = quick(case[0], callbacks=[Callback(), callback], early_stopping=False)
        message = (
            r"callback (EarlyStopping|Checkpoint) monitors 'valid_\w+', .* early_stopping=True"
        )
        with pytest.raises(ValueError, match=message):
            model.fit(zoo, case[1])
        assert not hasattr(model, "weights_")

    @pytest.mark.parametrize("callback", ["early_stopping", 3, ("a", "b"), ("a", Callback(), 1)])
    def test_what_is_none_is_named(self, callback, zoo, targets, quick):
        model = quick(MLPNetClassifier, callbacks=[Callback(), callback])
        with pytest.raises(ValueError, match=r"callbacks\[1\] is .*; give a callback of skorch"):
            model.fit(zoo, targets["binary"])

    def test_classes_and_none_are_taken(self, zoo, targets, quick):
        callbacks = [Callback, ("a", Callback), ("b", None)]
        quick(MLPNetClassifier, callbacks=callbacks).fit(zoo, targets["binary"])


class TestOutput:
    def test_silent_at_zero(self, case, zoo, quick, capsys):
        quick(case[0], max_epochs=30, patience=1, lr=0.1).fit(zoo, case[1])
        assert capsys.readouterr() == ("", "")

    def test_a_table_at_two(self, case, zoo, quick, capsys):
        quick(case[0], verbose=2).fit(zoo, case[1])
        header, rule, *rows = capsys.readouterr().out.splitlines()
        assert {"epoch", "train_loss", "valid_loss", "lr", "dur"} <= set(header.split())
        assert set(rule) <= {"-", " "}
        assert [row.split()[0] for row in rows[:3]] == ["1", "2", "3"]
