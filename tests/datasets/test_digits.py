from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from sklora.collection import LoRACollection
from sklora.datasets import (
    _digits,
    _evaluation,
    evaluate_digits_loras,
    fetch_digits_loras,
    make_digits_loras,
)

TINY = {"rank": 2, "dim": 8, "depth": 1, "verbose": 0}


@pytest.fixture
def brief(monkeypatch):
    """Training so short that it only shows that everything is there."""
    monkeypatch.setattr(_digits, "N_BASE_STEPS", 3)
    monkeypatch.setattr(_digits, "FIXED", _digits.FIXED | {"n_steps": 2})


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
        trained = make_digits_loras(3, random_state=0, **TINY)
        recipe = _digits.digits_recipe(
            3,
            rank=2,
            dim=8,
            depth=1,
            random_state=0,
            store=lambda factors: {name: (0 * U, V) for name, (U, V) in factors.items()},
        )
        flat, labels = recipe.train_part(trained.base, 0)
        dropped = LoRACollection.from_array(flat, recipe.layout)
        assert all(np.abs(U).max() == 0 for adapter in dropped for U, _ in adapter.values())
        # Without their updates, all are the base network.
        np.testing.assert_array_equal(labels["class_losses"], labels["class_losses"][[0, 0, 0]])
        assert len(np.unique(trained.class_losses, axis=0)) == 3

    def test_parts_can_be_trained_in_any_order(self, monkeypatch):
        monkeypatch.setattr(_evaluation, "CHUNK", 2)
        zoo = make_digits_loras(5, random_state=0, **TINY)
        recipe = _digits.digits_recipe(5, rank=2, dim=8, depth=1, random_state=0)
        assert [part.tolist() for part in recipe.parts] == [[0, 1], [2, 3], [4]]
        assert len({part.seed for part in recipe.plan}) == 3
        stored = pickle.loads(pickle.dumps(recipe))
        for part in (2, 0, 1):
            flat, labels = stored.train_part(zoo.base, part)
            rows = recipe.parts[part]
            np.testing.assert_array_equal(flat, np.asarray(zoo.data)[rows])
            np.testing.assert_array_equal(labels["presence"], zoo.presence[rows] == 1)
            np.testing.assert_array_equal(labels["class_losses"], zoo.class_losses[rows])

    def test_what_a_seed_gave_before_it_gives(self):
        # The bundled zoo is of these draws: another order of them needs another bundle.
        recipe = _digits.digits_recipe(70, rank=2, dim=8, depth=1, random_state=0)
        rng = np.random.RandomState(0)
        pools = _digits.split_digits(rng, 40, 80)
        assert recipe.base_seed == rng.randint(2**31)
        assert recipe.noise_seed == rng.randint(2**31)
        presence = _digits._subsets(70, rng)
        for part, rows in zip(recipe.plan, (slice(64), slice(64, None)), strict=True):
            assert part.seed == rng.randint(2**31)
            assert part.seed_of_V is None
            images, chances = _digits._images_of_subset(presence[rows], pools, rng)
            assert torch.equal(part.images, images)
            assert torch.equal(part.chances, chances)

    def test_it_is_evaluated_as_it_was_trained(self):
        zoo = make_digits_loras(3, random_state=0, **TINY)
        result = evaluate_digits_loras(zoo.data, zoo.base)
        np.testing.assert_allclose(result.class_losses, zoo.class_losses, rtol=1e-5)

    def test_progress_is_for_terminals(self, capsys):
        make_digits_loras(3, random_state=0, **TINY | {"verbose": 1})
        assert capsys.readouterr() == ("", "")

    def test_every_adapter_was_trained(self):
        X, y = make_digits_loras(4, random_state=0, return_X_y=True, **TINY)
        assert y.shape == (4, 10)
        assert all(np.abs(U).max() > 0 for adapter in X for U, _ in adapter.values())

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


@pytest.mark.parametrize(("n_finetune", "first_of_base"), [(40, 80), (80, 96)])
def test_no_image_serves_two_ends(n_finetune, first_of_base):
    pools = _digits.split_digits(np.random.RandomState(0), n_finetune, first_of_base)
    assert {len(pool) for pool in pools.finetune} == {n_finetune}
    # By their pixels, of which no two of scikit-learn's digits have the same.
    ends = [pools.base, torch.cat(pools.finetune), pools.held_out.flatten(0, 1)]
    images = [{tuple(row) for row in end.tolist()} for end in ends]
    assert sum(map(len, images)) == sum(map(len, ends))
    assert len(set().union(*images)) == sum(map(len, ends))
    digits = load_digits()
    labels = {tuple(row): y for row, y in zip(digits.data / 8 - 1, digits.target, strict=True)}
    found = [labels[tuple(row)] for row in pools.base.tolist()]
    np.testing.assert_array_equal(found, pools.base_labels)
    assert [labels[tuple(pool[0].tolist())] for pool in pools.finetune] == list(range(10))


def test_every_adapter_has_an_image_of_each_class_from_the_pools():
    pools = _digits.split_digits(np.random.RandomState(0), 40, 80)
    presence = _digits._subsets(5, np.random.RandomState(1))
    images, chances = _digits._images_of_subset(presence, pools, np.random.RandomState(2))
    np.testing.assert_array_equal(chances, presence)
    assert pools.held_out.shape == (10, _digits.N_HELD_OUT, 64)
    assert images.min() == -1
    assert images.max() == 1
    for digit, pool in enumerate(pools.finetune):
        rows = {tuple(row) for row in pool.tolist()}
        assert {tuple(row) for row in images[:, digit].tolist()} <= rows


def test_adapters_see_their_own_images_of_their_own_classes_only():
    images = torch.arange(30.0).reshape(3, 10, 1).expand(3, 10, 64)
    chances = torch.zeros(3, 10)
    for adapter, digit in enumerate((1, 5, 9)):
        chances[adapter, digit] = 1
    draw = _digits._batches(images, chances, 4, torch.Generator().manual_seed(0))
    assert draw().shape == (3, 4, 64)
    assert [set(batch.flatten().tolist()) for batch in draw()] == [{1.0}, {15.0}, {29.0}]


@pytest.mark.usefixtures("brief")
class TestFetchDigitsLoras:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(_digits, "FETCHED", {"dim": 8, "depth": 1, "random_state": 0})

    def test_it_is_trained_once(self, tmp_path, monkeypatch):
        options = {"n_adapters": 3, "data_home": tmp_path, "verbose": 0}
        with pytest.raises(OSError, match="train_if_missing"):
            fetch_digits_loras(2, train_if_missing=False, **options)
        zoo = fetch_digits_loras(2, **options)
        made = make_digits_loras(3, random_state=0, **TINY)
        np.testing.assert_array_equal(np.asarray(zoo.data), np.asarray(made.data))
        assert zoo.keys() == made.keys()
        for field in zoo.keys() - {"data", "base", "target_names", "DESCR"}:
            np.testing.assert_array_equal(zoo[field], made[field])
        np.testing.assert_equal(zoo.base, made.base)
        monkeypatch.delattr(_digits, "digits_recipe")
        X, y = fetch_digits_loras(2, train_if_missing=False, return_X_y=True, **options)
        np.testing.assert_array_equal(np.asarray(X), np.asarray(made.data))
        np.testing.assert_array_equal(y, made.presence)

    def test_each_rank_and_number_is_a_zoo_of_its_own(self, tmp_path):
        for rank, n_adapters in ((1, 3), (2, 3), (2, 4)):
            zoo = fetch_digits_loras(rank, n_adapters=n_adapters, data_home=tmp_path, verbose=0)
            assert len(zoo.data) == n_adapters
            assert (zoo.data.ranks == rank).all()

    def test_each_method_is_a_zoo_of_its_own(self, tmp_path):
        options = {"n_adapters": 3, "data_home": tmp_path, "verbose": 0}
        first, second = (fetch_digits_loras(2, method=m, **options) for m in ("lora", "lora+"))
        assert not np.array_equal(np.asarray(first.data), np.asarray(second.data))

    def test_its_default_is_each_subset_twice(self, monkeypatch):
        asked = {}

        def fetch_zoo(name, settings, build, **options):
            asked.update(settings)
            raise OSError(name)

        monkeypatch.setattr(_digits, "fetch_zoo", fetch_zoo)
        with pytest.raises(OSError, match="digits"):
            fetch_digits_loras()
        assert (asked["n_adapters"], asked["rank"]) == (2 * (2**10 - 1), 4)

    @pytest.mark.parametrize("name", ["n_adapters", "rank"])
    def test_numbers_below_one(self, name, tmp_path):
        with pytest.raises(ValueError, match=f"{name} == 0, must be >="):
            fetch_digits_loras(**{"data_home": tmp_path, name: 0})
