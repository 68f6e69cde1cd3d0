from __future__ import annotations

import numpy as np
import pytest
import torch

from sklora.datasets import _bundle, _digits, load_digits_loras


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


def test_it_is_small():
    assert _bundle.PATH.stat().st_size < 6e6


def test_data_and_target_alone(zoo):
    X, y = load_digits_loras(return_X_y=True)
    np.testing.assert_array_equal(np.asarray(X), np.asarray(zoo.data))
    np.testing.assert_array_equal(y, zoo.presence)


def test_rounding_keeps_what_the_file_holds():
    factors = {"q": (torch.randn(3, 6, 2), torch.randn(3, 4, 2))}
    once = _bundle._round(factors)
    for kept, factor in zip(once["q"], factors["q"], strict=True):
        largest = factor.abs().amax(dim=(1, 2), keepdim=True)
        assert ((kept - factor).abs() <= 0.5001 * largest / 127).all()


def test_what_is_made_is_what_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(_digits, "N_BASE_STEPS", 3)
    monkeypatch.setattr(_digits, "FIXED", _digits.FIXED | {"n_steps": 2})
    settings = {"n_adapters": 6, "rank": 2, "varied": False, "dim": 8, "depth": 1}
    monkeypatch.setattr(_bundle, "SETTINGS", settings)
    monkeypatch.setattr(_bundle, "PATH", tmp_path / "zoo.safetensors")
    _bundle.make_bundle(_bundle.PATH, verbose=0)
    expected = _digits.train_zoo(
        **settings, random_state=_bundle.SEED, verbose=0, store=_bundle._round
    )
    found = load_digits_loras()
    np.testing.assert_allclose(
        np.asarray(found.data), np.asarray(expected.data), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(found.class_losses, expected.class_losses)
    assert found.data.layout == expected.data.layout
