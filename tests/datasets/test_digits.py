from __future__ import annotations

import numpy as np
import pytest
import torch

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
        assert set(zoo.data.layout.ranks) == {2}
        assert zoo.target is zoo.presence
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

    @pytest.mark.parametrize("name", ["n_adapters", "rank", "depth", "dim"])
    def test_numbers_below_one(self, name):
        with pytest.raises(ValueError, match=f"{name} == 0, must be >="):
            make_digits_loras(**{"n_adapters": 3} | TINY | {name: 0})

    def test_dim_and_heads(self):
        with pytest.raises(ValueError, match=r"dim is 10; .* multiple of 4"):
            make_digits_loras(3, dim=10)


def test_every_subset_comes_before_any_comes_again():
    presence = _digits._subsets(2046, np.random.RandomState(0))
    codes = presence @ 2 ** np.arange(10)
    for half in np.split(codes, 2):
        np.testing.assert_array_equal(np.sort(half), np.arange(1, 1024))
    assert len(set(_digits._subsets(100, np.random.RandomState(1)) @ 2 ** np.arange(10))) == 100


def test_no_image_serves_two_ends():
    pools = _digits._split_digits(np.random.RandomState(0))
    # Two people may have drawn the same 64 pixels; sklearn's digits hold no such pair.
    ends = [pools.base, torch.cat(pools.finetune), pools.held_out.flatten(0, 1)]
    images = [{tuple(row) for row in end.tolist()} for end in ends]
    assert sum(map(len, images)) == sum(map(len, ends))
    assert len(set().union(*images)) == sum(map(len, ends))


def test_adapters_see_their_own_classes_only():
    images = torch.arange(10.0).repeat(3, 1)[..., None].expand(3, 10, 64)
    chances = torch.zeros(3, 10)
    for adapter, digit in enumerate((1, 5, 9)):
        chances[adapter, digit] = 1
    draw = _digits._batches(images, chances, 4, torch.Generator().manual_seed(0))
    assert draw().shape == (3, 4, 64)
    assert [set(batch.flatten().tolist()) for batch in draw()] == [{1.0}, {5.0}, {9.0}]


def test_chunks_hold_one_batch_size_and_every_row_once():
    rng = np.random.RandomState(0)
    hyper = _digits._hyperparameters(300, True, rng)
    chunks = list(_digits._chunks(hyper))
    assert all(len(set(hyper["batch_size"][rows])) == 1 for rows in chunks)
    assert max(map(len, chunks)) <= _digits.CHUNK
    np.testing.assert_array_equal(np.sort(np.concatenate(chunks)), np.arange(300))
