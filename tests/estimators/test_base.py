"""What the four estimators share, each on one kind of target."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import joblib
import numpy as np
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from skorch.callbacks import Callback

from sklora import SVDSpectrum
from sklora.collection import LoRACollection, LoRALayout
from sklora.estimators import (
    GLNetClassifier,
    GLNetRegressor,
    MLPNetClassifier,
    MLPNetRegressor,
    glnet,
)
from sklora.estimators._data import split_validation


def train_losses(model):
    return [epoch["train_loss"] for epoch in model.history_]


class TestFittedState:
    def test_is_arrays_numbers_and_strings(self, case, zoo, quick):
        model = quick(case[0]).fit(zoo, case[1])
        fitted = {name: value for name, value in vars(model).items() if name.endswith("_")}
        plain = (np.ndarray, np.generic, int, float, str, bool, type(None), LoRALayout)

        def check(value):
            if isinstance(value, dict):
                assert all(isinstance(key, str) for key in value)
                value = list(value.values())
            if isinstance(value, (list, tuple)):
                for item in value:
                    check(item)
            else:
                assert isinstance(value, plain)

        check(fitted)
        assert all(w.dtype == np.float32 for w in model.weights_.values())

    def test_net_is_rebuilt_in_float64(self, case, zoo, quick):
        model = quick(case[0]).fit(zoo, case[1])
        net = model.net_
        assert not net.training
        assert {p.dtype for p in net.parameters()} == {torch.float64}
        for name, value in net.state_dict().items():
            np.testing.assert_array_equal(value, model.weights_[name])
        with torch.no_grad():
            next(net.parameters()).zero_()
        assert np.any(next(iter(model.weights_.values())))
        with pytest.raises(AttributeError, match="abacus"):  # as displays expect of attributes
            _ = model.set_params(device="abacus").net_

    def test_rebuilding_draws_no_random_numbers(self, case, zoo, quick):
        model = quick(case[0]).fit(zoo, case[1])
        before = torch.get_rng_state()
        model.predict(zoo)
        assert torch.equal(torch.get_rng_state(), before)

    def test_parameters_set_after_fit_wait_for_the_next_one(self, case, zoo, quick):
        model = quick(case[0]).fit(zoo, case[1])
        expected = model.predict(zoo)
        model.set_params(hidden_dim=9, n_layers=3)
        np.testing.assert_array_equal(model.predict(zoo), expected)

    def test_unfitted(self, case, zoo, quick):
        model = quick(case[0])
        assert not hasattr(model, "net_")
        with pytest.raises(NotFittedError):
            _ = model.net_
        with pytest.raises(NotFittedError):
            model.predict(zoo)

    def test_survives_pickle_and_copy(self, case, zoo, quick):
        model = quick(case[0]).fit(zoo, case[1])
        for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            np.testing.assert_array_equal(twin.predict(zoo), model.predict(zoo))


def test_same_predictions_in_a_new_process(zoo, targets, quick, tmp_path):
    models = [
        quick(estimator).fit(zoo, targets[kind])
        for estimator, kind in (
            (GLNetClassifier, "binary"),
            (GLNetRegressor, "many"),
            (MLPNetClassifier, "multilabel"),
            (MLPNetRegressor, "single"),
        )
    ]
    joblib.dump((models, zoo), tmp_path / "models.joblib")
    script = (
        "import joblib, sys\n"
        "models, X = joblib.load(sys.argv[1] + '/models.joblib')\n"
        "joblib.dump([(m._outputs(X), m.predict(X)) for m in models], sys.argv[1] + '/out.joblib')"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    results = joblib.load(tmp_path / "out.joblib")
    for model, (outputs, predictions) in zip(models, results, strict=True):
        np.testing.assert_array_equal(outputs, model._outputs(zoo))
        np.testing.assert_array_equal(predictions, model.predict(zoo))


class TestRandomness:
    def test_refits_are_identical(self, case, zoo, quick, same_state):
        first = quick(case[0], dropout=0.3).fit(zoo, case[1])
        torch.manual_seed(123)
        second = clone(first).fit(zoo, case[1])
        assert same_state(first, second)
        assert train_losses(first) == train_losses(second)
        assert same_state(first, second.fit(zoo, case[1]))

    def test_seeds_differ(self, case, zoo, quick, same_state):
        models = [quick(case[0], random_state=seed, early_stopping=False) for seed in (0, 1)]
        one, other = (model.fit(zoo, case[1]) for model in models)
        assert not same_state(one, other)

    def test_global_generators_are_untouched(self, case, zoo, quick):
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
        quick(case[0], dropout=0.3).fit(zoo, case[1])
        assert torch.equal(torch.get_rng_state(), before)
        np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_default_dtype_makes_no_difference(self, dtype, case, zoo, quick, same_state):
        expected = quick(case[0]).fit(zoo, case[1])
        torch.set_default_dtype(dtype)
        try:
            model = quick(case[0]).fit(zoo, case[1])
            np.testing.assert_array_equal(model.predict(zoo), expected.predict(zoo))
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(w.dtype == np.float32 for w in model.weights_.values())
        assert same_state(model, expected)

    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
    def test_autograd_mode_makes_no_difference(self, mode, case, zoo, quick, same_state):
        expected = quick(case[0]).fit(zoo, case[1])
        with mode():
            model = quick(case[0]).fit(zoo, case[1])
            np.testing.assert_array_equal(model.predict(zoo), expected.predict(zoo))
        assert same_state(model, expected)

    def test_autocast_makes_no_difference(self, case, zoo, quick, same_state):
        expected = quick(case[0]).fit(zoo, case[1])
        with torch.autocast("cpu", torch.bfloat16):
            model = quick(case[0]).fit(zoo, case[1])
            np.testing.assert_array_equal(model.predict(zoo), expected.predict(zoo))
        assert same_state(model, expected)

    def test_default_device_makes_no_difference(self, case, zoo, quick, same_state):
        expected = quick(case[0]).fit(zoo, case[1])
        with torch.device("meta"):  # a device that has no numbers
            model = quick(case[0]).fit(zoo, case[1])
            np.testing.assert_array_equal(model.predict(zoo), expected.predict(zoo))
        assert same_state(model, expected)


class TestPrediction:
    def test_one_row_is_many(self, case, zoo, quick):
        model = quick(case[0]).fit(zoo, case[1])
        single = np.concatenate([model._outputs(zoo[[i]]) for i in range(len(zoo))])
        np.testing.assert_allclose(single, model._outputs(zoo), rtol=1e-10, atol=1e-12)

    def test_blocks_make_no_difference(self, case, zoo, quick, monkeypatch):
        model = quick(case[0]).fit(zoo, case[1])
        expected, reads = model._outputs(zoo), []
        read = LoRACollection.read
        monkeypatch.setattr(
            LoRACollection, "read", lambda X, rows=None, **_: reads.append(rows) or read(X, rows)
        )
        with sklearn.config_context(working_memory=0.02):
            blocked = model._outputs(zoo)
        assert len(reads) > 4
        np.testing.assert_allclose(blocked, expected, rtol=1e-10, atol=1e-12)

    def test_flat_rows_of_the_layout_are_the_collection(self, case, zoo, quick, same_state):
        model = quick(case[0]).fit(zoo, case[1])
        np.testing.assert_array_equal(model.predict(np.asarray(zoo)), model.predict(zoo))
        flat = quick(case[0], layout=zoo.layout).fit(np.asarray(zoo), case[1])
        assert same_state(flat, model)

    def test_float32_and_memory_maps(self, case, zoo, quick, tmp_path, same_state):
        flat = np.asarray(zoo).astype(np.float32)
        np.save(tmp_path / "zoo.npy", flat)
        mapped = np.load(tmp_path / "zoo.npy", mmap_mode="r")
        one, other = (
            quick(case[0]).fit(LoRACollection.from_array(X, zoo.layout), case[1])
            for X in (flat, mapped)
        )
        assert same_state(one, other)

    def test_array_api_dispatch_makes_no_difference(
        self, case, zoo, quick, monkeypatch, same_state
    ):
        weights = np.linspace(0.5, 1.5, 60)
        expected = quick(case[0]).fit(zoo, case[1], sample_weight=weights)
        monkeypatch.setenv("SCIPY_ARRAY_API", "1")
        with sklearn.config_context(array_api_dispatch=True):
            model = quick(case[0]).fit(zoo, case[1], sample_weight=weights)
            np.testing.assert_array_equal(model.predict(zoo), expected.predict(zoo))
            assert model.score(zoo, case[1]) == expected.score(zoo, case[1])
            assert quick(case[0]).fit(zoo, case[1]).n_iter_ == 3
        assert same_state(model, expected)

    def test_cross_validation(self, case, zoo, quick):
        scores = cross_val_score(quick(case[0]), zoo, case[1], cv=3, error_score="raise")
        assert np.isfinite(scores).all()

    def test_a_large_rank_is_no_work_for_adapters_without(
        self, random_loras, rng, traces, quick, monkeypatch
    ):
        small, large = (list(random_loras(rng, n, rank=rank)) for n, rank in ((58, 1), (2, 8)))
        X = LoRACollection.from_factors([*small[:3], *large, *small[3:]])
        model = quick(GLNetRegressor).fit(X, traces)
        expected = np.concatenate([model.predict(X[[row]]) for row in range(60)])
        read, seen = GLNetRegressor._forward, []

        def watched(self, net, layout, dtype):
            seen.append(layout.ranks)
            return read(self, net, layout, dtype)

        monkeypatch.setattr(GLNetRegressor, "_forward", watched)
        np.testing.assert_allclose(model.predict(X), expected, rtol=1e-10)
        assert seen == [(1, 1, 1), (8, 8, 8)]

    def test_nor_is_it_before_training(self, random_loras, rng, traces, quick, monkeypatch):
        small, large = (list(random_loras(rng, n, rank=rank)) for n, rank in ((58, 1), (2, 8)))
        X = LoRACollection.from_factors([*small[:3], *large, *small[3:]])
        cut, seen = glnet.cut_factors, []

        def watched(rows, layout, memory=None, **options):
            seen.append((len(rows), layout.ranks) if memory is None else None)
            return cut(rows, layout, memory, **options)

        monkeypatch.setattr(glnet, "cut_factors", watched)
        model = quick(GLNetRegressor, spectrum=True)
        spectra = model._training_data(X, traces, None, None, reset=True).columns["spectra"]
        expected = SVDSpectrum(device="cpu").fit_transform(X)
        np.testing.assert_allclose(np.sort(spectra), np.sort(expected), atol=1e-10)
        model.set_params(early_stopping=False).fit(X, traces)
        assert {*seen} == {(58, (1, 1, 1)), (2, (8, 8, 8)), None}


class TestEarlyStopping:
    def test_what_is_held_out(self, case, zoo, quick, monkeypatch):
        seen, rows = [], []

        def split(y, fraction, random_state, *, classes):
            seen.append((len(y), fraction, classes))
            both = split_validation(y, fraction, random_state, classes=classes)
            rows.append(both[1].tolist())
            return both

        monkeypatch.setattr("sklora.estimators._base.split_validation", split)
        for seed in (0, 1, 0):
            quick(case[0], validation_fraction=0.3, random_state=seed).fit(zoo, case[1])
        assert seen == [(60, 0.3, case[1].dtype.kind == "U")] * 3
        assert rows[0] == rows[2] != rows[1]

    def test_restores_the_best_weights(self, case, zoo, quick):
        rng = np.random.default_rng(0)
        y = rng.permutation(case[1])
        model = quick(case[0], max_epochs=60, patience=4, lr=0.05).fit(zoo, y)
        losses = [epoch["valid_loss"] for epoch in model.history_]
        assert model.n_iter_ == len(losses) < 60
        until_best = clone(model).set_params(patience=60, max_epochs=60)
        assert len(until_best.fit(zoo, y).history_) == 60

    def test_off_trains_on_all_rows_for_all_epochs(self, case, zoo, quick):
        model = quick(case[0], early_stopping=False, max_epochs=5).fit(zoo, case[1])
        assert model.n_iter_ == 5
        assert "valid_loss" not in model.history_[0]

    @pytest.mark.parametrize(("n_rows", "spares"), [(199, False), (200, True)])
    def test_auto_spares_rows_of_two_hundred(self, case, zoo, quick, n_rows, spares):
        rows = np.arange(n_rows) % len(zoo)
        model = quick(case[0], early_stopping="auto").fit(zoo[rows], case[1][rows])
        assert ("valid_loss" in model.history_[0]) == spares

    def test_few_rows_are_all_trained_on(self, case, zoo, quick):
        model = quick(case[0]).fit(zoo[:20], case[1][:20])
        assert "valid_loss" not in model.history_[0]


class TestGoingOn:
    def test_partial_fit_learns(self, case, zoo, quick):
        model = quick(case[0], lr=0.01)
        classes = {"classes": np.unique(case[1])} if case[1].dtype.kind == "U" else {}
        for _ in range(15):
            model.partial_fit(zoo, case[1], **classes)
        assert model.n_iter_ == len(model.history_) == 15
        assert [epoch["epoch"] for epoch in model.history_] == [*range(1, 16)]
        assert train_losses(model)[-1] < 0.8 * train_losses(model)[0]

    def test_partial_fit_goes_on_after_pickling(self, case, zoo, quick, same_state):
        first = {"classes": np.unique(case[1])} if case[1].dtype.kind == "U" else {}
        model = quick(case[0]).partial_fit(zoo, case[1], **first)
        twin = pickle.loads(pickle.dumps(model))
        assert same_state(model.partial_fit(zoo, case[1]), twin.partial_fit(zoo, case[1]))

    def test_partial_fit_goes_on_from_fit(self, case, zoo, quick, same_state):
        model = quick(case[0]).fit(zoo, case[1])
        before = copy.deepcopy(model)
        assert not same_state(before, model.partial_fit(zoo, case[1]))
        assert model.n_iter_ == before.n_iter_ + 1
        assert not hasattr(model.fit(zoo, case[1]), "optimizer_state_")

    @pytest.mark.parametrize(("first", "second"), [("sgd", "adam"), ("adamw", "sgd")])
    def test_partial_fit_with_another_optimizer_begins_with_no_moments(
        self, first, second, case, zoo, quick, same_state
    ):
        classes = {"classes": np.unique(case[1])} if case[1].dtype.kind == "U" else {}
        model = quick(case[0], optimizer=first).partial_fit(zoo, case[1], **classes)
        twin = copy.deepcopy(model)
        del twin.optimizer_state_
        for one in (model, twin):
            one.set_params(optimizer=second).partial_fit(zoo, case[1])
        assert same_state(model, twin)
        assert model.optimizer_state_.keys() == twin.optimizer_state_.keys()

    def test_fit_after_partial_fit_begins_with_no_moments(self, case, zoo, quick, same_state):
        classes = {"classes": np.unique(case[1])} if case[1].dtype.kind == "U" else {}
        model = quick(case[0], warm_start=True).partial_fit(zoo, case[1], **classes)
        twin = copy.deepcopy(model)
        del twin.optimizer_state_
        assert same_state(model.fit(zoo, case[1]), twin.fit(zoo, case[1]))

    @pytest.mark.parametrize("how", ["partial_fit", "warm_start"])
    def test_another_order_is_drawn_each_time(self, how, case, zoo, quick):
        orders = [[]]

        class Order(Callback):
            def __deepcopy__(self, memo):
                return self

            def on_batch_begin(self, net, batch, training, **kwargs):
                orders[-1].append(batch[0]["rows"][0, 0].item())

        settings = {"max_epochs": 1, "early_stopping": False, "callbacks": [Order()]}
        model = quick(case[0], warm_start=True, batch_size=8, **settings).fit(zoo, case[1])
        go_on = model.partial_fit if how == "partial_fit" else model.fit
        for _ in range(3):
            orders.append([])
            go_on(zoo, case[1])
        assert len(set(map(tuple, orders))) == 4

    def test_warm_start_goes_on(self, case, zoo, quick):
        cold = quick(case[0], lr=0.01, max_epochs=10).fit(zoo, case[1])
        losses = train_losses(cold)
        cold.set_params(warm_start=True).fit(zoo, case[1])
        assert train_losses(cold)[0] < 0.9 * losses[0]
        cold.set_params(warm_start=False).fit(zoo, case[1])
        assert train_losses(cold)[0] == losses[0]

    def test_warm_start_on_another_layout(self, case, zoo, quick):
        model = quick(case[0], warm_start=True).fit(zoo, case[1])
        other = LoRALayout([("q", 6, 4, 2), ("k", 5, 5, 2), ("w", 6, 4, 2)])
        with pytest.raises(ValueError, match=r"module 'w'.*module 'v'"):
            model.fit(LoRACollection.from_array(np.asarray(zoo), other), case[1])

    def test_warm_start_with_another_architecture(self, case, zoo, quick):
        model = quick(case[0], warm_start=True).fit(zoo, case[1])
        with pytest.raises(ValueError, match=r"hidden_dim is 7.*fitted with 4"):
            model.set_params(hidden_dim=7).fit(zoo, case[1])


class TestWeights:
    def test_weight_zero_is_leaving_out(self, case, zoo, quick, same_state):
        estimator, y = case
        weights = np.ones(60)
        weights[::4] = 0
        kept = np.flatnonzero(weights)
        weighted = quick(estimator).fit(zoo, y, sample_weight=weights)
        assert same_state(weighted, quick(estimator).fit(zoo[kept], y[kept]))

    def test_are_routed(self, case, zoo, quick):
        weights = np.linspace(0.1, 2, 60)
        with sklearn.config_context(enable_metadata_routing=True):
            model = quick(case[0]).set_fit_request(sample_weight=True)
            model.set_score_request(sample_weight=False)
            scores = cross_val_score(
                model, zoo, case[1], cv=2, params={"sample_weight": weights}, error_score="raise"
            )
        assert np.isfinite(scores).all()

    def test_scale_of_weights_does_not_matter(self, case, zoo, quick):
        one, other = (
            quick(case[0], optimizer="sgd").fit(zoo, case[1], sample_weight=np.full(60, weight))
            for weight in (1.0, 8.0)
        )
        np.testing.assert_allclose(one._outputs(zoo), other._outputs(zoo), rtol=1e-4, atol=1e-5)

    def test_weights_of_parts_compare_from_call_to_call(self, case, zoo, quick, same_state):
        estimator, y = case
        classes = {"classes": np.unique(y)} if y.dtype.kind == "U" else {}
        model = quick(estimator).partial_fit(zoo, y, **classes)
        one, same, other = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
        one.partial_fit(zoo, y)
        assert same_state(one, same.partial_fit(zoo, y, sample_weight=np.ones(60)))
        assert not same_state(one, other.partial_fit(zoo, y, sample_weight=np.full(60, 0.01)))

    def test_weights_matter(self, case, zoo, quick, same_state):
        estimator, y = case
        weights = np.linspace(0.1, 2, 60)
        weighted = quick(estimator).fit(zoo, y, sample_weight=weights)
        assert not same_state(weighted, quick(estimator).fit(zoo, y))

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            (np.zeros(60), "sample_weight|Sample weights"),
            (-np.ones(60), "[Nn]egative"),
            (np.ones(59), "sample_weight"),
            (np.full(60, np.nan), "sample_weight contains NaN"),
            (np.full(60, 1e308), "sample_weight.*(too large|overflow)"),
        ],
    )
    def test_bad_weights(self, weights, message, case, zoo, quick):
        with pytest.raises(ValueError, match=message):
            quick(case[0]).fit(zoo, case[1], sample_weight=weights)

    def test_bad_weights_of_a_part(self, case, zoo, quick):
        estimator, y = case
        classes = {"classes": np.unique(y)} if y.dtype.kind == "U" else {}
        with pytest.raises(ValueError, match=r"sample_weight.*too large"):
            quick(estimator).partial_fit(zoo, y, sample_weight=np.full(60, 1e39), **classes)


@pytest.mark.gpu
def test_cuda_and_cpu_agree(case, zoo, quick, cuda, same_state):
    expected = quick(case[0], early_stopping=False).fit(zoo, case[1])
    model = quick(case[0], early_stopping=False, device=cuda)
    before = torch.cuda.get_rng_state()
    model.fit(zoo, case[1])
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert same_state(model, clone(model).fit(zoo, case[1]))
    np.testing.assert_allclose(
        model.set_params(device="cpu")._outputs(zoo),
        model.set_params(device=cuda)._outputs(zoo),
        rtol=1e-9,
        atol=1e-9,
    )
    assert expected.weights_.keys() == model.weights_.keys()
