from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from sklora.collection import LoRACollection
from sklora.datasets import _denoiser as denoiser
from sklora.datasets import _evaluation, evaluate_digits_loras, make_code_loras
from sklora.testing import apply_gauge

SHAPES = denoiser.module_shapes(8, 1)


@pytest.fixture(scope="module")
def base():
    generator = torch.Generator().manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.data / 8 - 1).float()
    held_out = torch.stack([images[digits.target == c][:4] for c in range(10)])
    return {
        **{name: w.numpy() for name, w in denoiser.init_base(8, 1, generator).items()},
        **_evaluation.fit_classifier(images[100:].numpy(), digits.target[100:]),
        _evaluation.HELD_OUT: held_out.numpy(),
        _evaluation.NOISE: _evaluation.draw_noise(held_out, seed=7).numpy(),
    }


def loras(n_adapters=3, rank=2, dtype=np.float32, scale=0.3):
    rng = np.random.default_rng(0)
    return LoRACollection.from_factors(
        [
            {
                name: (scale * rng.normal(size=(n, rank)), scale * rng.normal(size=(m, rank)))
                for name, (n, m) in SHAPES.items()
            }
            for _ in range(n_adapters)
        ],
        dtype=dtype,
    )


def test_what_it_returns(base):
    result = evaluate_digits_loras(loras(), base, verbose=0)
    assert result.keys() == {"class_losses", "samples", "class_probabilities"}
    assert result.class_losses.shape == result.class_probabilities.shape == (3, 10)
    assert result.samples.shape == (3, 33, 8, 8)
    assert result.samples.min() == 0
    assert result.samples.max() == 16
    np.testing.assert_allclose(result.class_probabilities.sum(axis=1), 1, rtol=1e-5)
    assert len(np.unique(result.class_losses, axis=0)) == 3


def test_each_adapter_alone_and_blocks_of_them(base, monkeypatch):
    X = loras(5)
    together = evaluate_digits_loras(X, base, verbose=0)
    monkeypatch.setattr(_evaluation, "CHUNK", 2)
    blocks = evaluate_digits_loras(X, base, verbose=0)
    alone = evaluate_digits_loras(X[3:4], base, verbose=0)
    for name, values in together.items():
        np.testing.assert_allclose(blocks[name], values, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(alone[name][0], values[3], rtol=1e-3, atol=1e-3)


def test_losses_are_those_of_the_noise(base, monkeypatch):
    result = evaluate_digits_loras(loras(), base, verbose=0)
    # A network that finds no noise is off by the variance of the noise.
    monkeypatch.setattr(denoiser, "denoise", lambda base, noisy, time, factors: 0 * noisy)
    blind = evaluate_digits_loras(loras(), base, verbose=0)
    expected = np.square(base[_evaluation.NOISE]).mean(axis=(1, 2))
    np.testing.assert_allclose(blind.class_losses, np.tile(expected, (3, 1)), rtol=1e-5)
    assert not np.allclose(result.class_losses, blind.class_losses)


def test_a_network_that_finds_the_noise_loses_nothing(base, monkeypatch):
    noises = iter(torch.from_numpy(base[_evaluation.NOISE]))
    monkeypatch.setattr(
        denoiser,
        "denoise",
        lambda base, noisy, time, factors: next(noises).expand(len(noisy), -1, -1),
    )
    X = loras()
    factors = _evaluation.unpack(np.asarray(X), X.layout, torch.float32)
    losses = _evaluation.class_losses(_evaluation.to_tensors(base), factors)
    np.testing.assert_array_equal(losses, np.zeros((3, 10)))


def test_every_image_is_seen_at_four_times(base, monkeypatch):
    seen = []
    monkeypatch.setattr(
        denoiser,
        "denoise",
        lambda base, noisy, time, factors: seen.append((noisy[0], time[0])) or noisy,
    )
    X, tensors = loras(1), _evaluation.to_tensors(base)
    _evaluation.class_losses(tensors, _evaluation.unpack(X.read(), X.layout, torch.float32))
    times = torch.tensor([1, 3, 5, 7] * 4) / 8
    for (noisy, time), images, noise in zip(
        seen, tensors[_evaluation.HELD_OUT], tensors[_evaluation.NOISE], strict=True
    ):
        torch.testing.assert_close(time, times)
        clean = images.repeat_interleave(4, dim=0)
        torch.testing.assert_close(noisy, denoiser.add_noise(clean, times, noise))


def test_no_update_is_the_base_network(base):
    X = loras()
    zero = LoRACollection.from_array(0 * np.asarray(X), X.layout)
    result = evaluate_digits_loras(zero, base, verbose=0)
    tensors = _evaluation.to_tensors(base)
    noise = torch.randn(33, 64, generator=torch.Generator().manual_seed(_evaluation.SAMPLE_SEED))
    expected = denoiser.sample(tensors, noise[None], _evaluation.N_SAMPLE_STEPS)
    images = (expected.numpy().reshape(33, 8, 8) + 1) * 8
    for samples in result.samples:
        np.testing.assert_allclose(samples, images, rtol=1e-3, atol=1e-3)


def test_it_is_of_the_update_whatever_the_gauge(base):
    """In float64, at a condition number of a million, within 1e-6."""
    X = loras(dtype=np.float64)
    result = evaluate_digits_loras(X, base, verbose=0)
    moved = apply_gauge(X, condition=1e6, random_state=0)
    assert not np.allclose(np.asarray(moved), np.asarray(X))
    again = evaluate_digits_loras(moved, base, verbose=0)
    merged = dict(base)
    for name, (U, V) in X[0].items():
        merged[name] = base[name] + U @ V.T
    none = LoRACollection.from_array(0 * np.asarray(X[:1]), X.layout)
    alone = evaluate_digits_loras(none, merged, verbose=0)
    for name, values in result.items():
        assert values.dtype == np.float64
        np.testing.assert_allclose(again[name], values, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(alone[name][0], values[0], rtol=1e-6, atol=1e-6)


def test_ranks_may_be_mixed_and_modules_may_lack(base):
    X = loras(dtype=np.float64)
    adapters = [dict(adapter) for adapter in X]
    rng = np.random.default_rng(1)
    wide = {
        name: (rng.normal(size=(n, 3)), rng.normal(size=(m, 3))) for name, (n, m) in SHAPES.items()
    }
    del adapters[1]["blocks.0.mlp.up"]
    mixed = LoRACollection.from_factors([*adapters, wide])
    result = evaluate_digits_loras(mixed, base, verbose=0)
    expected = evaluate_digits_loras(X, base, verbose=0)
    for name, values in expected.items():
        np.testing.assert_allclose(result[name][[0, 2]], values[[0, 2]], rtol=1e-6, atol=1e-6)
        assert not np.allclose(result[name][1], values[1])
    few = LoRACollection.from_factors([{"blocks.0.attn.to_q": X[0]["blocks.0.attn.to_q"]}])
    assert evaluate_digits_loras(few, base, verbose=0).samples.shape == (1, 33, 8, 8)


def test_the_classifier_tells_real_digits(base):
    digits = load_digits()
    images = torch.from_numpy(digits.data[:100] / 8 - 1).float()[:, None]
    found = _evaluation.class_probabilities(_evaluation.to_tensors(base), images)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    assert (found.argmax(axis=1) == digits.target[:100]).mean() > 0.9
    pairs = images.view(50, 2, 64)
    mean = _evaluation.class_probabilities(_evaluation.to_tensors(base), pairs)
    np.testing.assert_allclose(mean, found.reshape(50, 2, 10).mean(axis=1), rtol=1e-5)


@pytest.mark.parametrize("name", ["blocks.1.attn.to_q", "blocks.0.mlp.up"])
def test_another_network(base, name):
    X = LoRACollection.from_factors([{name: (np.ones((8, 1)), np.ones((8, 1)))}])
    with pytest.raises(ValueError, match=f"'{name}' of X has the shape .*of one zoo"):
        evaluate_digits_loras(X, base)


@pytest.mark.parametrize("name", ["head", "time.up", "classifier.coef"])
def test_weights_that_take_no_adapter_are_no_modules(base, name):
    n, m = base[name].shape
    X = LoRACollection.from_factors([{name: (np.ones((n, 1)), np.ones((m, 1)))}])
    with pytest.raises(ValueError, match=f"'{name}' of X has the shape .*of one zoo"):
        evaluate_digits_loras(X, base)


def test_adapters_of_a_language_model_are_refused():
    zoo = make_code_loras(1, rank=1, dim=2, depth=1, random_state=0, verbose=0)
    with pytest.raises(ValueError, match=r"'layers\.0\..*of one zoo"):
        evaluate_digits_loras(zoo.data, zoo.base)


def test_no_adapters(base):
    with pytest.raises(ValueError, match="0 adapters while a minimum of 1 is required"):
        evaluate_digits_loras(loras()[:0], base)


def test_magnitudes_of_dora_are_not_passed_over(base):
    side = [{"blocks.0.mlp.up:magnitude_out": np.ones(16)}]
    X = LoRACollection.from_factors([dict(loras(1)[0])], side=side)
    with pytest.raises(ValueError, match="X holds magnitudes of DoRA"):
        evaluate_digits_loras(X, base)


def test_side_features_of_other_kinds_are_no_hindrance(base):
    X = loras(1)
    noted = LoRACollection.from_factors([dict(X[0])], side=[{"epochs": np.ones(1)}])
    found, expected = (evaluate_digits_loras(some, base, verbose=0) for some in (noted, X))
    np.testing.assert_allclose(found.class_losses, expected.class_losses, rtol=1e-5)
