"""Classes, labels and numbers as targets."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, softmax
from sklearn.base import clone
from sklearn.exceptions import DataConversionWarning
from sklearn.model_selection import cross_val_predict
from sklearn.utils import get_tags

from sklora import MLPNetRegressor
from sklora.estimators._targets import _class_weights


class TestClassifier:
    def test_binary(self, classifier, zoo, targets, quick):
        model = quick(classifier).fit(zoo, targets["binary"])
        proba, decision, predicted = (
            getattr(model, name)(zoo) for name in ("predict_proba", "decision_function", "predict")
        )
        assert model.classes_.tolist() == ["no", "yes"]
        assert proba.shape == (60, 2)
        assert decision.shape == (60,)
        np.testing.assert_allclose(proba.sum(1), 1)
        np.testing.assert_allclose(proba[:, 1], expit(decision))
        np.testing.assert_array_equal(predicted, np.where(decision > 0, "yes", "no"))

    def test_multiclass(self, classifier, zoo, targets, quick):
        model = quick(classifier).fit(zoo, targets["multiclass"])
        proba, decision = model.predict_proba(zoo), model.decision_function(zoo)
        assert model.classes_.tolist() == ["low", "mid", "top"]
        assert proba.shape == decision.shape == (60, 3)
        np.testing.assert_allclose(proba, softmax(decision, axis=1))
        np.testing.assert_array_equal(model.predict(zoo), model.classes_[proba.argmax(1)])

    def test_multilabel(self, classifier, zoo, targets, quick):
        model = quick(classifier).fit(zoo, targets["multilabel"])
        proba, decision = model.predict_proba(zoo), model.decision_function(zoo)
        assert model.classes_.tolist() == [0, 1, 2]
        assert isinstance(proba, np.ndarray)
        np.testing.assert_allclose(proba, expit(decision))
        np.testing.assert_array_equal(model.predict(zoo), (proba > 0.5).astype(int))
        assert model.predict(zoo).dtype == np.int64
        assert model.score(zoo, targets["multilabel"]) >= 0
        two = quick(classifier).fit(zoo, targets["multilabel"][:, :2])
        assert two.decision_function(zoo).shape == (60, 2)

    @pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
    def test_logarithms(self, kind, classifier, zoo, targets, quick):
        model = quick(classifier).fit(zoo, targets[kind])
        np.testing.assert_allclose(np.exp(model.predict_log_proba(zoo)), model.predict_proba(zoo))

    def test_logarithms_of_shares_that_round_to_zero(
        self, classifier, zoo, targets, quick, monkeypatch
    ):
        model = quick(classifier).fit(zoo, targets["binary"])
        logits = np.array([[0.0, 5000.0]])
        monkeypatch.setattr(classifier, "_outputs", lambda *_: logits)
        np.testing.assert_array_equal(model.predict_proba(zoo), [[0, 1]])
        np.testing.assert_array_equal(model.predict_log_proba(zoo), [[-5000, 0]])
        model.multilabel_ = True
        logits *= -1
        np.testing.assert_array_equal(model.predict_proba(zoo), [[0.5, 0]])
        np.testing.assert_array_equal(model.predict_log_proba(zoo), [[np.log(0.5), -5000]])

    @pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
    def test_learns(self, kind, classifier, zoo, targets, quick):
        model = quick(classifier, hidden_dim=8, max_epochs=80, lr=0.02, early_stopping=False).fit(
            zoo, targets[kind]
        )
        assert (model.predict(zoo) == targets[kind]).mean() > 0.95

    @pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
    def test_cross_validated_probabilities(self, kind, classifier, zoo, targets, quick):
        proba = cross_val_predict(
            quick(classifier), zoo, targets[kind], cv=2, method="predict_proba"
        )
        assert proba.shape == (60, 3)

    @pytest.mark.parametrize("values", [(0, 1), (-1.0, 1.0), (False, True), ("b", "a")])
    def test_classes_of_any_type(self, values, classifier, zoo, quick):
        y = np.array(values)[np.arange(60) % 2]
        model = quick(classifier).fit(zoo, y)
        np.testing.assert_array_equal(model.classes_, np.unique(y))
        assert model.predict(zoo).dtype == y.dtype

    def test_a_column_of_classes_is_flattened(self, classifier, zoo, targets, quick):
        with pytest.warns(DataConversionWarning, match="column-vector"):
            model = quick(classifier).fit(zoo, targets["binary"][:, None])
        assert model.predict(zoo).shape == (60,)

    def test_tags(self, classifier):
        tags = get_tags(classifier())
        assert tags.estimator_type == "classifier"
        assert tags.classifier_tags.multi_class
        assert tags.classifier_tags.multi_label
        assert tags.target_tags.required
        assert not tags.input_tags.sparse

    @pytest.mark.parametrize("y", [np.zeros(60), np.repeat("only", 60)])
    def test_one_class(self, y, classifier, zoo, quick):
        with pytest.raises(ValueError, match=r"at least two classes.*one class only"):
            quick(classifier).fit(zoo, y)

    def test_one_class_of_positive_weight(self, classifier, zoo, targets, quick):
        y = targets["binary"]
        with pytest.raises(ValueError, match=r"one class only: 'yes'\.$"):
            quick(classifier).fit(zoo, y, sample_weight=(y == "yes").astype(float))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda traces: traces, "Unknown label type: continuous"),
            (lambda traces: np.column_stack([traces, traces]), "Unknown label type"),
            (lambda traces: np.arange(120).reshape(60, 2) % 3, "multiclass-multioutput.*Fit one"),
            (lambda traces: np.where(traces > 0, np.nan, 1.0), "Input y contains NaN"),
            (lambda traces: np.arange(120).reshape(60, 2) % 2 + 1, r"holds \[1, 2\].*0 and 1"),
            (lambda traces: np.arange(120).reshape(60, 2) % 2 * 2 - 1, r"holds \[-1, 1\].*0 and 1"),
        ],
    )
    def test_targets_of_another_kind(self, make, message, classifier, zoo, traces, quick):
        with pytest.raises(ValueError, match=message):
            quick(classifier).fit(zoo, make(traces))


class TestClassWeight:
    def test_is_a_sample_weight(self, classifier, zoo, targets, quick, same_state):
        y = targets["multiclass"]
        by_class = {"low": 1.0, "mid": 5.0, "top": 0.5}
        weights = np.array([by_class[label] for label in y])
        one = quick(classifier, class_weight=by_class).fit(zoo, y)
        assert same_state(one, quick(classifier).fit(zoo, y, sample_weight=weights))

    def test_balanced(self, classifier, zoo, traces, quick, same_state):
        y = (traces > 2).astype(int)
        counts = np.bincount(y)
        weights = {label: 60 / (2 * count) for label, count in enumerate(counts)}
        one, other = (
            quick(classifier, class_weight=class_weight).fit(zoo, y)
            for class_weight in ("balanced", weights)
        )
        assert same_state(one, other)
        assert not same_state(one, quick(classifier).fit(zoo, y))

    def test_balanced_by_weights_whose_sum_overflows(self, classifier, zoo, targets, quick):
        y, weights = targets["binary"], np.linspace(0.1, 1, 60)
        model = quick(classifier, class_weight="balanced")
        one, large = (
            model._training_data(zoo, y, scale * weights, None, reset=True).weights
            for scale in (1, 1e308)
        )
        np.testing.assert_allclose(large, one * (large[0] / one[0]))

    @pytest.mark.parametrize("absent", [0, 1, 2])
    def test_balanced_weights_are_1_on_average_whatever_class_is_absent(self, absent):
        codes = np.repeat([0, 1, 2], [2, 3, 4])
        weights = (codes != absent).astype(float)
        per_class = _class_weights("balanced", np.arange(3), codes, weights)
        assert per_class[absent] == 1
        np.testing.assert_allclose(np.average(per_class[codes], weights=weights), 1)
        present = codes[codes != absent]
        counted = _class_weights("balanced", np.arange(3), present, np.ones(len(present)))
        np.testing.assert_allclose(counted, per_class)

    @pytest.mark.parametrize("kind", ["binary", "multilabel"])
    def test_balanced_counts_no_adapters_of_weight_zero(
        self, kind, classifier, zoo, targets, quick, same_state
    ):
        y = targets[kind]
        kept = np.flatnonzero((np.arange(60) % 2 == 0) | (y.reshape(60, -1)[:, 0] == y.flat[0]))
        weights = np.bincount(kept, minlength=60)
        model = quick(classifier, class_weight="balanced")
        one, other = (clone(model).fit(zoo, y, weights), clone(model).fit(zoo[kept], y[kept]))
        assert same_state(one, other)

    @pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
    def test_balanced_by_the_weights_of_adapters(self, kind, classifier, zoo, targets, quick):
        y, weights = targets[kind], np.linspace(0.1, 2, 60)
        model = quick(classifier, class_weight="balanced")
        data = model._training_data(zoo, y, weights, None, reset=True)
        for label, column in enumerate(data.targets.reshape(60, -1).T.astype(int)):
            totals = np.bincount(column, data.weights[:, label])
            np.testing.assert_allclose(totals, totals.mean())

    def test_balanced_without_adapters_of_some_class(self, classifier, zoo, targets, quick):
        y = targets["multiclass"]
        model = quick(classifier, class_weight="balanced", warm_start=True)
        model.fit(zoo, y, sample_weight=y != "low")
        assert model.classes_.tolist() == ["low", "mid", "top"]
        model.fit(zoo[y != "mid"], y[y != "mid"])
        assert model.classes_.tolist() == ["low", "mid", "top"]

    def test_weight_zero_is_leaving_out_of_the_loss(self, classifier, zoo, targets, quick):
        y = targets["multiclass"]
        model = quick(
            classifier, class_weight={"low": 1, "mid": 0, "top": 1}, max_epochs=40, lr=0.02
        )
        assert "mid" not in model.fit(zoo, y).predict(zoo)

    def test_multilabel_weighs_every_label(self, classifier, zoo, targets, quick, same_state):
        y = targets["multilabel"]
        balanced = [
            {value: 60 / (2 * count) for value, count in enumerate(np.bincount(y[:, label]))}
            for label in range(3)
        ]
        models = [
            quick(classifier, class_weight=class_weight).fit(zoo, y)
            for class_weight in (None, "balanced", balanced, [*balanced[:2], {0: 1, 1: 50}])
        ]
        assert same_state(models[1], models[2])
        assert not same_state(models[0], models[1])
        shares = [model.predict_proba(zoo)[:, 2].mean() for model in models]
        assert shares[3] > max(shares[:3])
        weighted = quick(classifier).fit(zoo, y, sample_weight=np.linspace(0.1, 2, 60))
        assert not same_state(models[0], weighted)

    def test_a_label_that_is_always_there(self, classifier, zoo, targets, quick):
        y = targets["multilabel"].copy()
        y[:, 1] = 1
        model = quick(classifier, class_weight="balanced", max_epochs=40, lr=0.02).fit(zoo, y)
        assert model.predict(zoo)[:, 1].all()

    @pytest.mark.parametrize("value", [0, 1])
    def test_a_part_without_a_value_that_has_a_weight(self, value, classifier, zoo, targets, quick):
        y = targets["multilabel"]
        model = quick(classifier, class_weight=[{1 - value: 5}] * 3).partial_fit(zoo, y)
        part = np.full((4, 3), value)
        losses = [
            copy.deepcopy(model).set_params(class_weight=cw).partial_fit(zoo[:4], part).history_
            for cw in (model.class_weight, None)
        ]
        assert losses[0][-1]["train_loss"] == losses[1][-1]["train_loss"]

    @pytest.mark.parametrize(
        ("kind", "class_weight", "message"),
        [
            ("multiclass", [{"low": 2}], "class_weight is a list.*multilabel"),
            ("multiclass", {"bottom": 2}, "class_weight"),
            ("multiclass", {"low": 0, "mid": 0, "top": 0}, "class_weight is zero for every"),
            ("multilabel", {0: 1, 1: 2}, "for 3 labels give a list of as many dicts"),
            ("multilabel", [{0: 1}], "for 3 labels give a list of as many dicts"),
            ("multiclass", "even", "'class_weight' parameter"),
            ("multiclass", {"low": np.nan}, "weights.*class_weight.*NaN, infinite or too large"),
            ("multiclass", {"low": np.inf}, "weights.*class_weight.*NaN, infinite or too large"),
        ],
    )
    def test_bad_ones(self, kind, class_weight, message, classifier, zoo, targets, quick):
        with pytest.raises(ValueError, match=message):
            quick(classifier, class_weight=class_weight).fit(zoo, targets[kind])


class TestPartialFit:
    def test_classes_may_come_later(self, classifier, zoo, targets, quick):
        y = targets["multiclass"]
        model = quick(classifier)
        for label in ("low", "mid", "top"):
            model.partial_fit(zoo[y == label], y[y == label], classes=["top", "mid", "low"])
        assert model.classes_.tolist() == ["low", "mid", "top"]
        assert model.predict_proba(zoo).shape == (60, 3)

    def test_labels_need_no_classes(self, classifier, zoo, targets, quick):
        model = quick(classifier).partial_fit(zoo, targets["multilabel"])
        assert model.predict(zoo[:4]).shape == (4, 3)

    def test_class_weights_compare_from_call_to_call(self, classifier, zoo, targets, quick):
        y = targets["binary"]
        models = [
            quick(classifier, class_weight=class_weight, lr=0.002, optimizer="sgd")
            for class_weight in ({"no": 10}, None, {"yes": 10})
        ]
        for model in models:
            for label in ("no", "yes", "no", "yes"):
                model.partial_fit(zoo[y == label], y[y == label], classes=["no", "yes"])
        shares = [model.predict_proba(zoo)[:, 1].mean() for model in models]
        assert shares[0] < shares[1] < shares[2]

    def test_classes_of_labels_are_their_numbers(self, classifier, zoo, targets, quick):
        y = targets["multilabel"]
        for classes in ([0, 1, 2], np.unique(y)):
            model = quick(classifier).partial_fit(zoo, y, classes=classes)
            assert model.partial_fit(zoo, y, classes=classes).n_iter_ == 2
        with pytest.raises(ValueError, match=r"classes=\['no', 'yes'\].*3 labels"):
            quick(classifier).partial_fit(zoo, y, classes=["no", "yes"])

    def test_zero_and_one_stand_for_labels_alone(self, classifier, zoo, quick):
        y = np.arange(60) % 3
        model = quick(classifier).partial_fit(zoo, y, classes=[0, 1, 2])
        with pytest.raises(ValueError, match="not those of the first call"):
            model.partial_fit(zoo, y, classes=[0, 1])

    def test_one_class_in_classes(self, classifier, zoo, targets, quick):
        with pytest.raises(ValueError, match=r"but classes holds one class only: 'no'\.$"):
            quick(classifier).partial_fit(zoo, targets["binary"], classes=["no"])

    @pytest.mark.parametrize(
        "classes", [{"no", "yes"}, 2, "no", []], ids=["set", "number", "text", "empty"]
    )
    def test_what_is_no_list_of_classes(self, classes, classifier, zoo, targets, quick):
        with pytest.raises(ValueError, match=r"is no list of classes; pass a list or an array\.$"):
            quick(classifier).partial_fit(zoo, targets["binary"], classes=classes)

    @pytest.mark.parametrize(
        ("kind", "change", "message"),
        [
            (
                "binary",
                lambda y: {"y": np.where(y == "no", "not", y)},
                r"classes \['not'\], which.*\['no', 'yes'\]\.",
            ),
            (
                "binary",
                lambda y: {"classes": ["a", "b"]},
                "not those of the first call.*'no', 'yes'",
            ),
            (
                "multiclass",
                lambda y: {"y": np.eye(3, dtype=int)[np.arange(60) % 3]},
                "one class per",
            ),
            ("multilabel", lambda y: {"y": y[:, :2]}, r"shape \(60, 2\).*3 labels"),
            ("multilabel", lambda y: {"y": y[:, 0]}, r"shape \(60,\).*3 labels"),
        ],
    )
    def test_what_does_not_go_on(self, kind, change, message, classifier, zoo, targets, quick):
        y = targets[kind]
        classes = None if kind == "multilabel" else np.unique(y)
        model = quick(classifier).partial_fit(zoo, y, classes=classes)
        before, expected = copy.deepcopy(vars(model)), model._outputs(zoo)
        with pytest.raises(ValueError, match=message):
            model.partial_fit(zoo, **{"y": y, "classes": None} | change(y))
        assert vars(model).keys() == before.keys()
        np.testing.assert_array_equal(model._outputs(zoo), expected)

    def test_first_call_needs_classes(self, classifier, zoo, targets, quick):
        model = quick(classifier)
        with pytest.raises(ValueError, match="classes must be passed on the first call"):
            model.partial_fit(zoo, targets["binary"])
        assert not [name for name in vars(model) if name.endswith("_")]

    def test_balanced_needs_all_of_the_data(self, classifier, zoo, targets, quick):
        with pytest.raises(ValueError, match="class_weight='balanced' cannot be found from part"):
            quick(classifier, class_weight="balanced").partial_fit(
                zoo, targets["binary"], classes=["no", "yes"]
            )


class TestRegressor:
    @pytest.mark.parametrize("kind", ["single", "many"])
    def test_learns(self, kind, regressor, zoo, targets, quick):
        model = quick(regressor, hidden_dim=16, max_epochs=150, lr=0.02, early_stopping=False).fit(
            zoo, targets[kind]
        )
        assert model.predict(zoo).shape == targets[kind].shape
        assert model.score(zoo, targets[kind]) > 0.95

    def test_one_column_stays_a_column(self, regressor, zoo, traces, quick):
        flat, column = (quick(regressor).fit(zoo, y) for y in (traces, traces[:, None]))
        np.testing.assert_array_equal(column.predict(zoo), flat.predict(zoo)[:, None])

    def test_unit_and_origin_of_the_target_do_not_matter(self, regressor, zoo, traces, quick):
        one, other = (quick(regressor).fit(zoo, y) for y in (traces, 1e6 * traces - 1e7))
        np.testing.assert_allclose(
            other.predict(zoo), 1e6 * one.predict(zoo) - 1e7, rtol=1e-3, atol=1e4
        )

    def test_standardises_by_weighted_moments(self, regressor, zoo, targets, quick):
        weights = np.linspace(0, 1, 60)
        model = quick(regressor).fit(zoo, targets["many"], sample_weight=weights)
        mean = np.average(targets["many"], axis=0, weights=weights)
        variance = np.average((targets["many"] - mean) ** 2, axis=0, weights=weights)
        np.testing.assert_allclose(model.target_mean_, mean)
        np.testing.assert_allclose(model.target_scale_, np.sqrt(variance))

    def test_rows_of_weight_zero_change_not_even_the_rounding(self, regressor, zoo, quick):
        for seed in range(10):
            rng = np.random.default_rng(seed)
            y, weights = rng.normal(3, 0.1, size=60), rng.uniform(size=60)
            weights[::3] = 0
            kept = np.flatnonzero(weights)
            one = quick(regressor, max_epochs=1).fit(zoo, y, sample_weight=weights)
            other = quick(regressor, max_epochs=1).fit(
                zoo[kept], y[kept], sample_weight=weights[kept]
            )
            np.testing.assert_array_equal(one.predict(zoo), other.predict(zoo))

    def test_a_constant_target(self, regressor, zoo, quick):
        model = quick(regressor, max_epochs=40, lr=0.02).fit(zoo, np.full(60, 1e8 + 0.1))
        np.testing.assert_allclose(model.predict(zoo), 1e8, atol=2)

    @given(
        value=st.floats(-1e9, 1e9).filter(lambda x: abs(x) > 1e-9), seed=st.integers(0, 2**32 - 1)
    )
    def test_rounding_is_no_spread_and_a_small_spread_is_no_rounding(self, value, seed):
        rng = np.random.default_rng(seed)
        weights = rng.uniform(0.1, 1, size=60)
        model = MLPNetRegressor()
        model._learn_targets(np.full(60, value), weights, None)
        assert model.target_scale_ == 1
        y = value * (1 + 1e-10 * rng.normal(size=60))
        model._learn_targets(y, weights, None)
        expected = np.sqrt(np.average((y - np.average(y, weights=weights)) ** 2, weights=weights))
        np.testing.assert_allclose(model.target_scale_, expected, rtol=1e-3)

    def test_tags(self, regressor):
        tags = get_tags(regressor())
        assert tags.estimator_type == "regressor"
        assert tags.target_tags.multi_output
        assert tags.target_tags.required

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda y: np.where(y > 0, np.inf, y), "Input y contains infinity"),
            (lambda y: y[:, None, None], r"y has shape \(60, 1, 1\)"),
            (lambda y: np.where(y > 0, "a", "b"), "could not convert string to float"),
            (lambda y: 1e200 * y, "mean and spread of y.*overflow"),
            (lambda y: np.full(60, np.finfo(float).max), "mean and spread of y.*overflow"),
        ],
    )
    def test_bad_targets(self, make, message, regressor, zoo, traces, quick):
        with pytest.raises(ValueError, match=message):
            quick(regressor).fit(zoo, make(traces))

    def test_partial_fit_of_another_number_of_targets(self, regressor, zoo, targets, quick):
        model = quick(regressor).partial_fit(zoo, targets["single"])
        with pytest.raises(ValueError, match=r"shape \(60, 2\).*fitted on targets of shape"):
            model.partial_fit(zoo, targets["many"])
