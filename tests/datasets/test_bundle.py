from __future__ import annotations

import numpy as np
import pytest
import torch

from sklora.datasets import _bundle, _digits, load_digits_loras
from sklora.datasets._zoos import train_zoo


@pytest.fixture(scope="module")
def zoo():
    return load_digits_loras()


def test_the_bundled_zoo(zoo):
    assert len(zoo.data) == len(zoo.target) == 1023
    assert zoo.data.layout.n_modules == 18
    assert np.unique(zoo.groups).size == 1023
    np.testing.assert_array_equal(zoo.size, zoo.presence.sum(axis=1))
    assert np.isfinite(np.asarray(zoo.data)).all()
    assert (zoo.data.ranks == 4).all()
    assert zoo.data.dtype == np.float32
    assert all(np.abs(U).max() > 0 for adapter in zoo.data for U, _ in adapter.values())


def test_its_targets_agree(zoo):
    assert zoo.target is zoo.presence
    assert zoo.target_names == list("0123456789")
    assert "denoising diffusion transformer" in zoo.DESCR
    np.testing.assert_array_equal(np.sort(zoo.groups), np.arange(1, 1024))
    np.testing.assert_array_equal(zoo.presence, zoo.groups[:, None] >> np.arange(10) & 1)
    assert zoo.class_losses.shape == zoo.presence.shape
    # In units of the noise's variance, which is 1.
    assert ((zoo.class_losses > 0) & (zoo.class_losses < 1)).all()
    own = np.ma.masked_array(zoo.class_losses, zoo.presence == 0).mean(axis=1)
    np.testing.assert_allclose(zoo.loss, own, rtol=1e-6)
    np.testing.assert_allclose(zoo.loss_all, zoo.class_losses.mean(axis=1), rtol=1e-6)


def test_an_adapter_does_better_on_its_own_digits(zoo):
    some = zoo.size < 10
    assert zoo.loss[some].mean() < zoo.loss_all[some].mean()


def test_its_files_are_small():
    sizes = {path.name: path.stat().st_size for path in _bundle.PATH.parent.iterdir()}
    assert _bundle.PATH.name in sizes
    assert max(sizes.values()) < 6e6


def test_data_and_target_alone(zoo):
    X, y = load_digits_loras(return_X_y=True)
    np.testing.assert_array_equal(np.asarray(X), np.asarray(zoo.data))
    np.testing.assert_array_equal(y, zoo.presence)


def test_it_is_made_as_it_was(zoo):
    recipe = _digits.digits_recipe(**_bundle.SETTINGS, random_state=_bundle.SEED)
    np.testing.assert_array_equal(recipe.labels["presence"], zoo.presence)
    assert recipe.layout == zoo.data.layout


def test_rounding_keeps_what_the_file_holds():
    generator = torch.Generator().manual_seed(0)
    factors = {"q": tuple(torch.randn(3, size, 2, generator=generator) for size in (6, 4))}
    factors["q"][0][1] = 0
    once = _bundle._round(factors)
    twice = _bundle._round(once)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0.0)
    assert torch.count_nonzero(once["q"][0][1]) == 0
    for kept, factor in zip(once["q"], factors["q"], strict=True):
        largest = factor.abs().amax(dim=(1, 2), keepdim=True)
        assert ((kept - factor).abs() <= 0.5001 * largest / 127).all()


def test_what_is_made_is_what_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(_digits, "N_BASE_STEPS", 3)
    monkeypatch.setattr(_digits, "FIXED", _digits.FIXED | {"n_steps": 2})
    monkeypatch.setattr(_bundle, "SETTINGS", {"n_adapters": 6, "rank": 2, "dim": 8, "depth": 1})
    monkeypatch.setattr(_bundle, "PATH", tmp_path / "zoo.safetensors")
    _bundle.make_bundle(_bundle.PATH, verbose=0)
    recipe = _digits.digits_recipe(
        **_bundle.SETTINGS, random_state=_bundle.SEED, store=_bundle._round
    )
    expected = _digits.make_bunch(train_zoo(recipe, verbose=0))
    found = load_digits_loras()
    np.testing.assert_allclose(
        np.asarray(found.data), np.asarray(expected.data), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(found.class_losses, expected.class_losses)
    assert found.data.layout == expected.data.layout
    for field in ("presence", "size", "loss", "loss_all", "groups"):
        np.testing.assert_array_equal(found[field], expected[field])
