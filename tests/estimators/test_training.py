from __future__ import annotations

import copy
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skorch import NeuralNet
from skorch.callbacks import Callback
from torch import nn

from sklora.estimators import MLPNetClassifier, MLPNetRegressor, _training
from sklora.estimators._data import OPTIMIZERS, TrainingData, TrainingSettings
from sklora.estimators._skorch import KeepBest, WeightedLoss
from sklora.estimators._training import moments_of, seeded, train

CPU = torch.device("cpu")
LOSSES = ["cross_entropy", "binary_cross_entropy", "squared_error"]


def batch(kind, rows=6, outputs=3, seed=0):
    """Outputs, targets and weights for one loss."""
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    if kind == "cross_entropy":
        target = torch.randint(outputs, (rows,), generator=generator)
        return predicted, target, torch.rand(rows, 1, generator=generator).double()
    target = torch.rand(rows, outputs, generator=generator).round().double()
    return predicted, target, torch.rand(rows, outputs, generator=generator).double()


class TestWeightedLoss:
    @pytest.mark.parametrize("kind", LOSSES)
    def test_is_the_mean_of_weighted_losses(self, kind):
        predicted, target, weight = batch(kind)
        if kind == "cross_entropy":
            losses = -torch.log_softmax(predicted, 1)[torch.arange(6), target][:, None]
        elif kind == "binary_cross_entropy":
            chance = torch.sigmoid(predicted)
            losses = -(target * chance.log() + (1 - target) * (1 - chance).log())
        else:
            losses = (predicted - target) ** 2
        torch.testing.assert_close(
            WeightedLoss(kind)((predicted, weight), target), (weight * losses).mean()
        )

    @pytest.mark.parametrize("kind", LOSSES)
    def test_rows_of_weight_zero_do_not_matter(self, kind):
        predicted, target, weight = batch(kind)
        weight[4:] = 0
        other_predicted, other_target, _ = batch(kind, seed=1)
        changed = predicted.clone()
        changed[4:], target_changed = other_predicted[4:], target.clone()
        target_changed[4:] = other_target[4:]
        gradients, losses = [], []
        for outputs, truth in ((predicted, target), (changed, target_changed)):
            outputs.requires_grad_()
            loss = WeightedLoss(kind)((outputs, weight), truth)
            loss.backward()
            gradients.append(outputs.grad)
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(gradients[0][:4], gradients[1][:4])
        assert all(torch.count_nonzero(gradient[4:]) == 0 for gradient in gradients)

    @pytest.mark.parametrize("kind", LOSSES)
    def test_a_weight_of_two_is_a_row_twice(self, kind):
        predicted, target, weight = batch(kind)
        weight = torch.ones_like(weight)
        twice = [torch.cat([t, t[:1]]) for t in (predicted, target, weight)]
        weight[0] = 2
        once = WeightedLoss(kind)((predicted, weight), target) * 6
        torch.testing.assert_close(once, WeightedLoss(kind)((twice[0], twice[2]), twice[1]) * 7)

    @pytest.mark.parametrize("kind", LOSSES)
    def test_a_batch_without_weight_is_no_nan(self, kind):
        predicted, target, weight = batch(kind)
        assert WeightedLoss(kind)((predicted, 0 * weight), target) == 0


class TestSeeded:
    def test_same_numbers_inside(self):
        with seeded(3, CPU):
            first = torch.randn(4)
        with seeded(3, CPU):
            torch.testing.assert_close(torch.randn(4), first)

    def test_generator_outside_is_untouched(self):
        torch.manual_seed(1)
        expected = torch.randn(4)
        torch.manual_seed(1)
        with seeded(3, CPU):
            torch.randn(7)
        torch.testing.assert_close(torch.randn(4), expected)

    def test_threads_take_turns(self):
        inside, leave = threading.Event(), threading.Event()

        def draw(until):
            with seeded(3, CPU):
                first = torch.randn(4)
                inside.set()
                assert until is None or until.wait(60)
                return torch.cat([first, torch.randn(4)])

        alone = draw(None)
        inside.clear()
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(draw, leave)
            assert inside.wait(60)
            other = pool.submit(draw, None)
            assert not wait([other], timeout=0.2).done
            leave.set()
            torch.testing.assert_close(one.result(), alone)
            torch.testing.assert_close(other.result(), alone)

    def test_one_inside_the_other(self):
        with seeded(3, CPU), seeded(4, CPU):
            torch.randn(4)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_fork_does_not_wait_for_a_thread_of_its_parent(self):
        inside, leave = threading.Event(), threading.Event()

        def hold():
            with seeded(3, CPU):
                inside.set()
                leave.wait(60)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(hold)
            assert inside.wait(60)
            pid = os.fork()
            if not pid:
                signal.alarm(60)  # a child that waits forever is killed
                with seeded(3, CPU), seeded(4, CPU):
                    os._exit(0)
            leave.set()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class TestTrain:
    settings = TrainingSettings(
        lr=0.05,
        weight_decay=0.0,
        optimizer="adamw",
        max_epochs=40,
        batch_size=16,
        patience=5,
        callbacks=(),
        verbose=0,
    )

    @pytest.fixture
    def data(self, zoo):
        rows = np.asarray(zoo)
        target = rows[:, :1] - 2 * rows[:, 1:2]
        return TrainingData(zoo, target.astype(np.float32), np.ones((60, 1), np.float32))

    @pytest.fixture
    def net(self, zoo):
        torch.manual_seed(0)
        return nn.Linear(zoo.layout.width, 1)

    def train(self, net, data, validation=None, optimizer_state=None, **changes):
        return train(
            net,
            lambda rows: net(rows.float()),
            "squared_error",
            data,
            validation,
            self.settings._replace(**changes),
            device=CPU,
            optimizer_state=optimizer_state,
        )

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_every_optimizer_learns(self, optimizer, net, data):
        history, _ = self.train(net, data, optimizer=optimizer)
        assert history[-1]["train_loss"] < 0.1 * history[0]["train_loss"]

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_weight_decay_keeps_the_weights_small(self, optimizer, net, data):
        start = {name: value.clone() for name, value in net.state_dict().items()}
        sizes = []
        for weight_decay in (0.0, 5.0):
            net.load_state_dict(start)
            self.train(net, data, optimizer=optimizer, lr=0.01, weight_decay=weight_decay)
            sizes.append(net.weight.detach().norm())
        assert sizes[1] < 0.7 * sizes[0]

    @pytest.mark.parametrize(
        ("name", "optimizer"),
        [
            ("adamw", torch.optim.AdamW),
            ("adam", torch.optim.Adam),
            ("sgd", partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
        ],
    )
    def test_steps_are_those_of_torch(self, name, optimizer, net, data):
        twin, options = copy.deepcopy(net), {"lr": 0.01, "weight_decay": 0.5}
        self.train(net, data, batch_size=60, max_epochs=3, decay=False, optimizer=name, **options)
        steps, rows = optimizer(twin.parameters(), **options), torch.tensor(np.asarray(data.loras))
        for _ in range(3):
            steps.zero_grad()
            (twin(rows.float()) - torch.from_numpy(data.targets)).square().mean().backward()
            steps.step()
        torch.testing.assert_close(net.weight, twin.weight, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_a_parameter_may_be_frozen_for_some_epochs(self, optimizer, net, data):
        class Freeze(Callback):
            def on_epoch_begin(self, trained, **_):
                net.bias.requires_grad_(len(trained.history) > 2)

        before = net.bias.item()
        self.train(net, data, optimizer=optimizer, max_epochs=2, callbacks=[Freeze()])
        assert net.bias.item() == before
        self.train(net, data, optimizer=optimizer, max_epochs=4, callbacks=[Freeze()])
        assert net.bias.item() != before

    def test_learning_rate_falls_along_half_a_cosine(self, net, data):
        history, _ = self.train(net, data, max_epochs=10)
        rates = [epoch["event_lr"] for epoch in history]
        np.testing.assert_allclose(rates, 0.025 * (1 + np.cos(np.pi * np.arange(10) / 10)))

    def test_stops_early_with_the_best_weights(self, net, data):
        rng = np.random.default_rng(0)
        noise = TrainingData(data.loras, rng.normal(size=(60, 1)).astype(np.float32), data.weights)
        training, validation = noise.take(np.arange(30)), noise.take(np.arange(30, 60))
        seen, counter = [], Callback()
        counter.on_epoch_end = lambda trained, **_: seen.append(len(trained.history))
        history, _ = self.train(net, training, validation, callbacks=[counter])
        losses = [epoch["valid_loss"] for epoch in history]
        assert len(seen) == len(history) < 40
        assert len(history) == np.argmin(losses) + 1 + 5
        outputs = net(torch.tensor(np.asarray(validation.loras)).float())
        loss = (outputs - torch.from_numpy(validation.targets)).square().mean().item()
        assert loss == pytest.approx(min(losses), rel=1e-5)

    def test_keeps_the_weights_at_which_a_callback_ends_the_training(self, net, data):
        class Target(Callback):
            def on_epoch_end(self, net, **_):
                if len(net.history) == 3:
                    raise KeyboardInterrupt

        history, _ = self.train(net, data, data, callbacks=[Target()])
        losses = [epoch["valid_loss"] for epoch in history]
        assert np.argmin(losses) == 2
        outputs = net(torch.tensor(np.asarray(data.loras)).float())
        loss = (outputs - torch.from_numpy(data.targets)).square().mean().item()
        assert loss == pytest.approx(losses[2], rel=1e-5)

    @pytest.mark.parametrize("validates", [True, False])
    @pytest.mark.parametrize("event", ["on_epoch_end", "on_batch_end"])
    def test_an_interrupt_leaves_the_weights_after_the_last_epoch(
        self, net, data, event, validates, recwarn
    ):
        """A callback that ends the training sees an epoch's end first, and batches before it."""
        kept = []

        def end(trained, **_):
            if len(trained.history) == 4 and trained.history[-1]["batches"][1:]:
                raise KeyboardInterrupt

        def keep(trained, **_):
            kept.append(net.weight.detach().clone())

        first, ender = Callback(), Callback()
        first.on_epoch_end = keep
        setattr(ender, event, end)
        history, _ = self.train(
            net, data, data if validates else None, callbacks=[first, ender], lr=1e-3
        )
        assert len(kept) == len(history) == (4 if event == "on_epoch_end" else 3)
        torch.testing.assert_close(net.weight.detach(), kept[-1], rtol=0, atol=0)

    def test_history_is_numbers(self, net, data):
        history, _ = self.train(net, data, max_epochs=2)
        assert [epoch["epoch"] for epoch in history] == [1, 2]
        assert all(
            isinstance(value, (int, float, bool)) for row in history for value in row.values()
        )

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_optimizer_state_carries_over(self, optimizer, net, data):
        """Two calls are one of twice as many epochs, when the order of the rows is the same."""
        changes = {"batch_size": 60, "decay": False, "optimizer": optimizer, "lr": 0.01}
        start = {name: value.clone() for name, value in net.state_dict().items()}
        self.train(net, data, max_epochs=4, **changes)
        expected = net.weight.detach().clone()
        net.load_state_dict(start)
        state = moments_of(self.train(net, data, max_epochs=2, **changes)[1])
        assert all(isinstance(value, np.ndarray) for value in state.values())
        self.train(net, data, max_epochs=2, optimizer_state=state, **changes)
        torch.testing.assert_close(net.weight.detach(), expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_optimizer_state_is_not_changed_by_what_goes_on_from_it(self, optimizer, net, data):
        changes = {"max_epochs": 1, "decay": False, "optimizer": optimizer, "lr": 0.01}
        state = moments_of(self.train(net, data, **changes)[1])
        before = {name: value.copy() for name, value in state.items()}
        assert before
        self.train(net, data, optimizer_state=state, **changes)
        for name, value in state.items():
            np.testing.assert_array_equal(value, before[name])

    def test_a_loss_that_falls_by_almost_nothing_is_no_progress(self, net):
        keeper = KeepBest(3, True, lambda *_, **__: None)
        trained = SimpleNamespace(module_=net, history=[])
        for epoch, loss in enumerate([1.0, 0.99995, 0.99992, 0.9998], start=1):
            trained.history.append({"epoch": epoch, "valid_loss": loss})
            keeper.on_epoch_end(trained)
            assert keeper.best_epoch == (1 if loss > 0.9999 else 4)
        assert not keeper.stopped

    @pytest.mark.parametrize(("losses", "best"), [([np.nan] * 3, 0), ([0.0] * 4, 1)])
    def test_losses_of_nan_and_zero_are_not_fallen_below(self, net, losses, best):
        keeper = KeepBest(3, True, lambda *_, **__: None)
        trained = SimpleNamespace(module_=net, history=[])
        for epoch, loss in enumerate(losses, start=1):
            trained.history.append({"epoch": epoch, "valid_loss": loss})
            ends = epoch == len(losses)
            with pytest.raises(KeyboardInterrupt) if ends else nullcontext():
                keeper.on_epoch_end(trained)
        assert keeper.best_epoch == best

    def test_divergence_is_said(self, net, data):
        with pytest.raises(ValueError, match=r"diverged.*lr=1e\+30 and weight_decay=0\.0.*smaller"):
            self.train(net, data, optimizer="sgd", lr=1e30)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_one_number_that_is_not_finite_is_divergence(self, net, data, name, value):
        class Spoil(Callback):
            def on_epoch_end(self, *_, **__):
                getattr(net, name).data.view(-1)[0] = value

        with pytest.raises(ValueError, match="diverged"):
            self.train(net, data, max_epochs=1, callbacks=[Spoil()])

    @pytest.mark.parametrize(
        ("owner", "name"), [(WeightedLoss, "forward"), (NeuralNet, "get_iterator")]
    )
    def test_an_interrupt_is_passed_on(self, net, data, monkeypatch, owner, name):
        """In the first epoch, and before it."""

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            self.train(net, data)


class TestSteps:
    @pytest.mark.parametrize(("batch_size", "n_batches"), [(64, None), (3, 10)])
    def test_an_epoch_has_about_eight_or_more(self, batch_size, n_batches, case, zoo, quick):
        """Of the rows that are trained on, which early stopping makes fewer."""
        parameters = {"batch_size": batch_size, "validation_fraction": 0.5}
        [epoch] = quick(case[0], max_epochs=1, **parameters).fit(zoo, case[1]).history_
        least = 4 if case[0] is MLPNetRegressor else 8
        assert epoch["train_batch_count"] == (n_batches or least)
        assert f"ceil(n / {least})" in case[0].__doc__

    def test_learning_rate_falls_in_fit_alone(self, case, zoo, quick):
        model = quick(case[0], lr=0.01, max_epochs=4).fit(zoo, case[1])
        rates = [epoch["event_lr"] for epoch in model.history_]
        np.testing.assert_allclose(rates, 0.005 * (1 + np.cos(np.pi * np.arange(4) / 4)))
        assert "event_lr" not in model.partial_fit(zoo, case[1]).history_[-1]

    def test_the_weights_are_there_once(self, case, zoo, quick):
        seen = []

        class Names(Callback):
            def on_epoch_end(self, net, **_):
                seen.extend(name.removeprefix("net.") for name in net.module_.state_dict())

        model = quick(case[0], max_epochs=1, callbacks=[Names()]).fit(zoo, case[1])
        assert seen == [*model.weights_]

    def test_partial_fit_is_one_epoch_that_holds_nothing_out(self, case, zoo, quick):
        epochs = []

        class Count(Callback):
            def on_epoch_end(self, trained, **_):
                epochs.append(trained.history[-1])

        classes = {"classes": np.unique(case[1])} if case[1].dtype.kind == "U" else {}
        model = quick(case[0], early_stopping=True, callbacks=[Count()])
        model.partial_fit(zoo, case[1], **classes)
        assert len(epochs) == 1
        assert "valid_loss" not in epochs[0]

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_partial_fit_goes_on_with_the_moments(self, optimizer, case, zoo, quick, same_state):
        classes = {"classes": np.unique(case[1])} if case[1].dtype.kind == "U" else {}
        model = quick(case[0], optimizer=optimizer).partial_fit(zoo, case[1], **classes)
        twin = copy.deepcopy(model)
        del twin.optimizer_state_
        assert not same_state(model.partial_fit(zoo, case[1]), twin.partial_fit(zoo, case[1]))

    def test_partial_fit_draws_anew_where_no_weight_has_changed(self, zoo, targets, quick):
        still = {"dropout": 0.5, "lr": 1e-30, "weight_decay": 0.0}
        model = quick(MLPNetRegressor, **still)
        for _ in range(3):
            model.partial_fit(zoo, targets["single"])
        assert len({epoch["train_loss"] for epoch in model.history_}) == 3

    def test_weights_decay(self, case, zoo, quick):
        sizes = []
        for decay in (0.0, 5.0):
            model = quick(case[0], weight_decay=decay, lr=0.05, early_stopping=False)
            weights = model.fit(zoo, case[1]).weights_
            sizes.append(sum((w**2).sum() for name, w in weights.items() if "mlp" in name))
        assert sizes[1] < 0.8 * sizes[0]

    def test_generator_goes_on_from_fit_to_fit(self, case, zoo, quick, same_state):
        generator = np.random.RandomState(0)
        states = (generator, generator, np.random.RandomState(0))
        first, second, again = (
            quick(case[0], random_state=state).fit(zoo, case[1]) for state in states
        )
        assert same_state(first, again)
        assert not same_state(first, second)


def test_docstrings_that_skorch_needs(monkeypatch, zoo, targets):
    monkeypatch.setattr(_training.train, "__doc__", None)  # as under python -OO
    with pytest.raises(RuntimeError, match="skorch, which trains networks, needs the docstrings"):
        MLPNetClassifier().fit(zoo, targets["binary"])
