from __future__ import annotations

import numpy as np
import pytest
import torch

from sklora.collection import LoRACollection
from sklora.datasets import _denoiser as denoiser
from sklora.datasets import _digits, make_digits_loras

TINY = {"rank": 2, "dim": 8, "depth": 1, "verbose": 0}


@pytest.fixture
def brief(monkeypatch):
    """Training so short that it only shows that everything is there."""
    monkeypatch.setattr(_digits, "N_BASE_STEPS", 3)
    monkeypatch.setattr(_digits, "FIXED", _digits.FIXED | {"n_steps": 2})
    monkeypatch.setattr(_digits, "VARIED", _digits.VARIED | {"n_steps": (1, 2, 3)})


@pytest.mark.usefixtures("brief")
class TestMakeDigitsLoras:
    def test_what_it_returns(self):
        zoo = make_digits_loras(5, random_state=0, **TINY)
        assert zoo.data.shape == (5, zoo.data.layout.width)
        assert zoo.data.layout.names[0] == "blocks.0.attn.to_q"
        assert isinstance(zoo.data, LoRACollection)
        assert zoo.data.layout.modules[4] == ("blocks.0.mlp.up", 16, 8, 2)
        assert zoo.data.dtype == np.float32
        assert (zoo.data.ranks == 2).all()
        assert zoo.target is zoo.presence
        assert zoo.target_names == list("0123456789")
        assert zoo.presence.shape == zoo.class_losses.shape == (5, 10)
        assert set(np.unique(zoo.presence)) == {0, 1}
        assert len(set(zoo.groups)) == 5
        np.testing.assert_array_equal(zoo.size, zoo.presence.sum(axis=1))
        for i in range(5):
            own = zoo.class_losses[i][zoo.presence[i] == 1]
            np.testing.assert_allclose(zoo.loss[i], own.mean(), rtol=1e-5)
        np.testing.assert_allclose(zoo.loss_all, zoo.class_losses.mean(axis=1), rtol=1e-5)
        assert "learning_rate" not in zoo

    def test_the_seed_decides(self):
        first, same, other = (make_digits_loras(3, random_state=s, **TINY) for s in (0, 0, 1))
        np.testing.assert_array_equal(np.asarray(first.data), np.asarray(same.data))
        np.testing.assert_array_equal(first.class_losses, same.class_losses)
        assert not np.array_equal(np.asarray(first.data), np.asarray(other.data))

    def test_a_generator_of_random_numbers_goes_on(self):
        seed = np.random.RandomState(0)
        first, second = (make_digits_loras(3, random_state=seed, **TINY) for _ in range(2))
        same = make_digits_loras(3, random_state=0, **TINY)
        np.testing.assert_array_equal(np.asarray(first.data), np.asarray(same.data))
        assert not np.array_equal(np.asarray(first.data), np.asarray(second.data))

    def test_losses_are_those_of_the_adapters_that_are_kept(self):
        trained = _digits.train_zoo(3, varied=False, random_state=0, **TINY)
        dropped = _digits.train_zoo(
            3,
            varied=False,
            random_state=0,
            store=lambda factors: {name: (0 * U, V) for name, (U, V) in factors.items()},
            **TINY,
        )
        assert all(np.abs(U).max() == 0 for adapter in dropped.data for U, _ in adapter.values())
        # Without their updates, all are the base network.
        np.testing.assert_array_equal(dropped.class_losses, dropped.class_losses[[0, 0, 0]])
        assert len(np.unique(trained.class_losses, axis=0)) == 3

    def test_progress_is_for_terminals(self, capsys):
        make_digits_loras(3, random_state=0, **TINY | {"verbose": 1})
        assert capsys.readouterr() == ("", "")

    def test_every_adapter_was_trained(self):
        X, y = make_digits_loras(4, random_state=0, return_X_y=True, **TINY)
        assert y.shape == (4, 10)
        assert all(np.abs(U).max() > 0 for adapter in X for U, _ in adapter.values())

    def test_varied_records_its_hyperparameters(self, monkeypatch):
        monkeypatch.setattr(_digits, "CHUNK", 2)
        zoo = make_digits_loras(9, varied=True, random_state=0, **TINY)
        low, high = _digits.VARIED["learning_rate"]
        assert ((low <= zoo.learning_rate) & (zoo.learning_rate <= high)).all()
        assert set(zoo.n_steps) <= {1, 2, 3}
        assert set(zoo.batch_size) <= set(_digits.VARIED["batch_size"])
        assert len(set(zoo.learning_rate)) == 9
        np.testing.assert_array_equal(zoo.size, zoo.presence.sum(axis=1))
        same = make_digits_loras(9, varied=True, random_state=0, **TINY)
        np.testing.assert_array_equal(np.asarray(zoo.data), np.asarray(same.data))

    @pytest.mark.parametrize("name", ["n_adapters", "rank", "depth", "dim"])
    def test_numbers_below_one(self, name):
        with pytest.raises(ValueError, match=f"{name} == 0, must be >="):
            make_digits_loras(**{"n_adapters": 3} | TINY | {name: 0})

    @pytest.mark.parametrize("name", ["n_adapters", "rank", "depth", "dim"])
    def test_numbers_that_are_no_integers(self, name):
        with pytest.raises(TypeError, match=f"{name} must be an instance of"):
            make_digits_loras(**{"n_adapters": 3} | TINY | {name: 8.0})

    def test_dim_and_heads(self):
        with pytest.raises(ValueError, match=r"dim is 10; .* multiple of 4"):
            make_digits_loras(3, dim=10)
        with pytest.raises(ValueError, match="dim == 2, must be >= 4"):
            make_digits_loras(3, dim=2)


def test_every_subset_comes_before_any_comes_again():
    presence = _digits._subsets(2046, np.random.RandomState(0))
    codes = presence @ 2 ** np.arange(10)
    for half in np.split(codes, 2):
        np.testing.assert_array_equal(np.sort(half), np.arange(1, 1024))
    assert len(set(_digits._subsets(100, np.random.RandomState(1)) @ 2 ** np.arange(10))) == 100


def test_no_image_serves_two_ends():
    pools = _digits._split_digits(np.random.RandomState(0))
    # By their pixels, of which no two of scikit-learn's digits have the same.
    ends = [pools.base, torch.cat(pools.finetune), pools.held_out.flatten(0, 1)]
    images = [{tuple(row) for row in end.tolist()} for end in ends]
    assert sum(map(len, images)) == sum(map(len, ends))
    assert len(set().union(*images)) == sum(map(len, ends))


def test_every_adapter_has_an_image_of_each_class_from_the_pools():
    pools = _digits._split_digits(np.random.RandomState(0))
    presence = _digits._subsets(5, np.random.RandomState(1))
    images, chances = _digits._images_of_subset(presence, pools, np.random.RandomState(2))
    np.testing.assert_array_equal(chances, presence)
    assert pools.held_out.shape == (10, _digits.N_HELD_OUT, 64)
    assert images.min() == -1
    assert images.max() == 1
    for digit, pool in enumerate(pools.finetune):
        rows = {tuple(row) for row in pool.tolist()}
        assert {tuple(row) for row in images[:, digit].tolist()} <= rows


def test_class_losses_are_those_of_each_adapter_on_each_class(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base = denoiser.init_base(8, 1, generator)
    factors = {
        name: tuple(torch.randn(3, size, 2, generator=generator) for size in shape)
        for name, shape in denoiser.module_shapes(8, 1).items()
    }
    held_out = torch.randn(10, 4, 64, generator=generator)
    losses = _digits.class_losses(base, factors, held_out, seed=7)
    assert losses.shape == (3, 10)
    for i in range(3):
        own = {name: (U[i : i + 1], V[i : i + 1]) for name, (U, V) in factors.items()}
        alone = _digits.class_losses(base, own, held_out, seed=7)
        np.testing.assert_allclose(alone[0], losses[i], rtol=1e-5)
    # A network that finds no noise is off by the variance of the noise.
    monkeypatch.setattr(denoiser, "denoise", lambda base, noisy, time, factors: 0 * noisy)
    np.testing.assert_allclose(_digits.class_losses(base, factors, held_out, 7), 1.0, atol=0.2)


def test_adapters_see_their_own_images_of_their_own_classes_only():
    images = torch.arange(30.0).reshape(3, 10, 1).expand(3, 10, 64)
    chances = torch.zeros(3, 10)
    for adapter, digit in enumerate((1, 5, 9)):
        chances[adapter, digit] = 1
    draw = _digits._batches(images, chances, 4, torch.Generator().manual_seed(0))
    assert draw().shape == (3, 4, 64)
    assert [set(batch.flatten().tolist()) for batch in draw()] == [{1.0}, {15.0}, {29.0}]


def test_chunks_hold_one_batch_size_and_every_row_once():
    rng = np.random.RandomState(0)
    hyper = _digits._hyperparameters(300, True, rng)
    chunks = list(_digits._chunks(hyper))
    assert all(len(set(hyper["batch_size"][rows])) == 1 for rows in chunks)
    assert max(map(len, chunks)) <= _digits.CHUNK
    np.testing.assert_array_equal(np.sort(np.concatenate(chunks)), np.arange(300))
