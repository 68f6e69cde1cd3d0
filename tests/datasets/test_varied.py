from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from sklora.collection import LoRACollection
from sklora.datasets import _denoiser as denoiser
from sklora.datasets import (
    _digits,
    _evaluation,
    _varied,
    evaluate_digits_loras,
    fetch_varied_digits_loras,
    make_varied_digits_loras,
)

TINY = {"rank": 2, "dim": 8, "depth": 1, "verbose": 0}


@pytest.fixture(scope="module", autouse=True)
def brief():
    """Training so short that it only shows that everything is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_digits, "N_BASE_STEPS", 3)
        patch.setattr(_varied, "VARIED", _varied.VARIED | {"n_steps": (1, 2, 3)})
        patch.setattr(_evaluation, "CHUNK", 5)
        yield


@pytest.fixture(scope="module")
def zoo():
    return make_varied_digits_loras(23, random_state=0, **TINY)


@pytest.fixture(scope="module")
def recipe(brief):
    return _varied.varied_recipe(23, 2, dim=8, depth=1, random_state=0)


@pytest.fixture(scope="module")
def pools():
    return _digits.split_digits(np.random.RandomState(0), _varied.N_FINETUNE, 96)


@pytest.fixture(scope="module")
def identities(pools):
    return _varied._identities(pools)


def test_what_it_returns(zoo):
    assert isinstance(zoo.data, LoRACollection)
    assert zoo.data.shape == (23, zoo.data.layout.width)
    assert (zoo.data.ranks == 2).all()
    assert zoo.target is zoo.attributes
    assert "an identity is four images" in zoo.DESCR
    assert zoo.target.shape == (23, len(zoo.target_names)) == (23, 5)
    assert set(np.unique(zoo.target)) == {0, 1}
    assert zoo.class_losses.shape == zoo.class_probabilities.shape == (23, 10)
    each = np.arange(23)
    np.testing.assert_array_equal(zoo.score, zoo.class_probabilities[each, zoo.digit])
    np.testing.assert_array_equal(zoo.loss, zoo.class_losses[each, zoo.digit])
    assert len(set(zoo.groups)) == 23
    assert all(np.abs(U).max() > 0 for adapter in zoo.data for U, _ in adapter.values())


def test_its_hyperparameters(zoo):
    low, high = _varied.VARIED["learning_rate"]
    assert ((low <= zoo.learning_rate) & (zoo.learning_rate <= high)).all()
    assert len(set(zoo.learning_rate)) == 23
    assert set(zoo.n_steps) == {1, 2, 3}
    assert set(zoo.batch_size) == set(_varied.VARIED["batch_size"])


def test_labels_are_those_of_the_identity(zoo, identities):
    np.testing.assert_array_equal(zoo.digit, identities.digit[zoo.groups])
    np.testing.assert_array_equal(zoo.attributes, identities.attributes[zoo.groups])


def test_score_and_losses_are_those_of_its_adapters(zoo):
    result = evaluate_digits_loras(zoo.data, zoo.base, verbose=0)
    for name in ("class_losses", "class_probabilities"):
        np.testing.assert_allclose(result[name], zoo[name], rtol=1e-3, atol=1e-4)


def test_parts_can_be_trained_in_any_order(zoo, recipe):
    rows = np.concatenate(recipe.parts)
    assert rows.tolist() != sorted(rows)
    np.testing.assert_array_equal(np.sort(rows), np.arange(23))
    for part in reversed(range(len(recipe.parts))):
        flat, labels = recipe.train_part(zoo.base, part)
        np.testing.assert_array_equal(flat, np.asarray(zoo.data)[recipe.parts[part]])
        for name, values in labels.items():
            np.testing.assert_allclose(values, zoo[name][recipe.parts[part]], rtol=1e-5)


def test_chunks_hold_one_batch_size_and_every_row_once():
    hyper = _varied._hyperparameters(60, np.random.RandomState(0))
    chunks = list(_varied._chunks(hyper))
    assert all(len(set(hyper["batch_size"][rows])) == 1 for rows in chunks)
    assert all(np.all(np.diff(hyper["n_steps"][rows]) >= 0) for rows in chunks)
    assert max(map(len, chunks)) <= _evaluation.CHUNK
    np.testing.assert_array_equal(np.sort(np.concatenate(chunks)), np.arange(60))


def test_an_adapter_is_trained_as_its_labels_say(recipe, identities):
    labels = recipe.labels
    for part in recipe.plan:
        assert (labels["batch_size"][part.rows] == part.batch_size).all()
        np.testing.assert_array_equal(labels["n_steps"][part.rows], part.n_steps)
        np.testing.assert_allclose(labels["learning_rate"][part.rows], part.learning_rate)
        np.testing.assert_array_equal(part.images, identities.images[labels["groups"][part.rows]])
        assert torch.equal(part.chances, torch.ones(len(part.rows), _varied.N_IMAGES))


def test_ranks_have_all_but_V_in_common(recipe, zoo):
    other = _varied.varied_recipe(23, 3, dim=8, depth=1, random_state=0)
    assert other.layout == recipe.layout.with_ranks([3] * 6)
    np.testing.assert_equal(other.labels, recipe.labels)
    np.testing.assert_equal(other.train_base(0), zoo.base)
    for one, same in zip(recipe.plan, other.plan, strict=True):
        np.testing.assert_array_equal(one.rows, same.rows)
        assert one.seed == same.seed
        assert one.seed_of_V is not None


def test_a_smaller_zoo_has_the_first_identities_and_hyperparameters(recipe):
    smaller = _varied.varied_recipe(7, 2, dim=8, depth=1, random_state=0)
    assert set(smaller.labels) == set(recipe.labels)
    for name, values in smaller.labels.items():
        np.testing.assert_array_equal(values, recipe.labels[name][:7])


def test_hyperparameters_fill_their_ranges():
    drawn = _varied._hyperparameters(2000, np.random.RandomState(0))
    low, high = _varied.VARIED["learning_rate"]
    assert low <= drawn["learning_rate"].min() < 1.1 * low
    assert high >= drawn["learning_rate"].max() > high / 1.1
    assert np.median(drawn["learning_rate"]) == pytest.approx((low * high) ** 0.5, rel=0.2)
    for name in ("n_steps", "batch_size"):
        values, counts = np.unique(drawn[name], return_counts=True)
        assert tuple(values) == _varied.VARIED[name]
        assert counts.min() > 0.8 * 2000 / len(values)


def test_training_draws_the_same_at_every_rank(recipe, zoo, monkeypatch):
    drawn = []
    loss = denoiser.noise_loss

    def watched(base, images, generator, factors):
        drawn.append((images, generator.get_state()))
        return loss(base, images, generator, factors)

    monkeypatch.setattr(denoiser, "noise_loss", watched)
    for rank in (1, 4):
        replace(recipe, rank=rank).train_part(zoo.base, 1)
    n_steps = len(drawn) // 2
    assert n_steps == recipe.plan[1].n_steps.max()
    for (images, state), (again, same) in zip(drawn[:n_steps], drawn[n_steps:], strict=True):
        assert torch.equal(images, again)
        assert torch.equal(state, same)


def test_identities_share_no_image_and_are_of_one_digit(pools, identities):
    assert identities.images.shape == (200, _varied.N_IMAGES, 64)
    assert len(np.unique(identities.images.reshape(-1, 64), axis=0)) == 10 * _varied.N_FINETUNE
    for digit, pool in enumerate(pools.finetune):
        own = identities.images[identities.digit == digit].reshape(-1, 64)
        np.testing.assert_array_equal(np.unique(own, axis=0), np.unique(pool, axis=0))


def test_images_of_an_identity_are_alike(pools, identities):
    within = [cdist(images, images).sum() / 12 for images in identities.images]
    digits = np.repeat(np.arange(10), 20)
    of_digit = np.array([cdist(pool, pool).sum() / (80 * 79) for pool in pools.finetune])
    assert np.mean(within / of_digit[digits]) < 0.85


def test_attributes_halve_the_identities(identities):
    shares = identities.attributes.mean(axis=0)
    np.testing.assert_array_equal(shares[1:], 0.5)
    assert 0.25 < shares[0] < 0.45
    loops = [identities.attributes[identities.digit == digit, 0].mean() for digit in range(10)]
    assert loops[0] > 0.9
    assert loops[1] < 0.1


def test_every_identity_comes_before_any_comes_again():
    groups = _digits.deal(450, 200, np.random.RandomState(0))
    assert len(groups) == 450
    for half in np.split(groups[:400], 2):
        np.testing.assert_array_equal(np.sort(half), np.arange(200))
    assert len(set(groups[400:])) == 50


def test_numbers_are_checked():
    for name in ("n_adapters", "rank", "depth", "dim"):
        with pytest.raises(ValueError, match=f"{name} == 0, must be >="):
            make_varied_digits_loras(**TINY | {name: 0})
    with pytest.raises(ValueError, match="rank == 0, must be >="):
        fetch_varied_digits_loras(0)


def test_it_is_fetched_as_it_is_made(tmp_path, monkeypatch, zoo):
    monkeypatch.setattr(_varied, "FETCHED", {"dim": 8, "depth": 1, "random_state": 0})
    options = {"n_adapters": 23, "data_home": tmp_path, "verbose": 0}
    with pytest.raises(OSError, match="train_if_missing"):
        fetch_varied_digits_loras(2, train_if_missing=False, **options)
    fetched = fetch_varied_digits_loras(2, **options)
    assert fetched.keys() == zoo.keys()
    np.testing.assert_array_equal(np.asarray(fetched.data), np.asarray(zoo.data))
    assert fetched.target_names == zoo.target_names
    assert fetched.base.keys() == zoo.base.keys()
    for field in zoo.keys() - {"data", "base", "target_names", "DESCR"}:
        np.testing.assert_allclose(fetched[field], zoo[field], rtol=1e-5)
    monkeypatch.delattr(_varied, "varied_recipe")
    X, y = fetch_varied_digits_loras(2, train_if_missing=False, return_X_y=True, **options)
    np.testing.assert_array_equal(np.asarray(X), np.asarray(zoo.data))
    np.testing.assert_array_equal(y, zoo.attributes)
