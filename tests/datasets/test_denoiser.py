from __future__ import annotations

import pytest
import torch

from sklora.datasets import _adam as adam
from sklora.datasets import _denoiser as denoiser

DIM, DEPTH = 8, 2
SHAPES = denoiser.module_shapes(DIM, DEPTH)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def base(generator):
    return denoiser.init_base(DIM, DEPTH, generator)


@pytest.fixture
def factors(generator):
    return {
        name: tuple(0.3 * torch.randn(3, size, 2, generator=generator) for size in shape)
        for name, shape in SHAPES.items()
    }


@pytest.fixture
def noisy(generator):
    return torch.randn(3, 5, 64, generator=generator)


@pytest.fixture
def time(generator):
    return torch.rand(3, 5, generator=generator)


def test_modules_that_take_an_adapter(base):
    assert len(SHAPES) == 6 * DEPTH
    assert {shape for name, shape in SHAPES.items() if "attn" in name} == {(8, 8)}
    assert SHAPES["blocks.1.mlp.up"] == (16, 8)
    assert SHAPES["blocks.1.mlp.down"] == (8, 16)
    assert all(base[name].shape == shape for name, shape in SHAPES.items())


def test_weights_keep_the_size_of_what_they_act_on(generator):
    for name, weight in denoiser.init_base(64, 1, generator).items():
        assert weight.square().sum(dim=1).mean().item() == pytest.approx(1.0, rel=0.5), name


def test_factors_start_as_those_of_peft(generator):
    """``V`` by `kaiming_uniform_` with ``a = sqrt(5)``, which is uniform up to ``m**-0.5``."""
    for name, (U, V) in denoiser.init_factors(SHAPES, 50, 4, generator).items():
        assert not U.any()
        drawn = V * SHAPES[name][1] ** 0.5
        assert -1 <= drawn.min() < -0.95
        assert 0.95 < drawn.max() <= 1


def test_patches_round_trip(generator):
    images = torch.randn(2, 3, 64, generator=generator)
    patches = denoiser._patches(images)
    assert patches.shape == (2, 3, 16, 4)
    assert torch.equal(patches[0, 0, 0], images[0, 0].reshape(8, 8)[:2, :2].flatten())
    assert torch.equal(denoiser._images(patches), images)


def test_noise_comes_with_time(generator):
    images, noise = torch.randn(2, 3, 64, generator=generator)
    noisy = denoiser.add_noise(images, torch.tensor([0.0, 1.0, 0.5]), noise)
    torch.testing.assert_close(noisy[0], images[0])
    torch.testing.assert_close(noisy[1], noise[1])
    # Half of the variance each, so that images of unit variance keep it.
    torch.testing.assert_close(noisy[2], (images[2] + noise[2]) / 2**0.5)


def test_factors_are_the_update_of_the_weight(base, factors, noisy, time):
    together = denoiser.denoise(base, noisy, time, factors)
    for i in range(3):
        merged = base | {name: base[name] + U[i] @ V[i].T for name, (U, V) in factors.items()}
        alone = denoiser.denoise(merged, noisy[i : i + 1], time[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_a_stack_is_one_adapter_at_a_time(base, factors, noisy, time):
    together = denoiser.denoise(base, noisy, time, factors)
    for i in range(3):
        own = {name: (U[i : i + 1], V[i : i + 1]) for name, (U, V) in factors.items()}
        alone = denoiser.denoise(base, noisy[i : i + 1], time[i : i + 1], own)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_an_image_at_a_time(base, factors, noisy, time):
    together = denoiser.denoise(base, noisy, time, factors)
    alone = denoiser.denoise(base, noisy[:, 2:3], time[:, 2:3], factors)
    torch.testing.assert_close(together[:, 2:3], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_every_module_matters(name, base, factors, noisy, time):
    found = denoiser.denoise(base, noisy, time, {name: factors[name]})
    assert (found - denoiser.denoise(base, noisy, time)).abs().max() > 1e-3


def test_adapters_start_as_no_update(base, generator, noisy, time):
    start = denoiser.init_factors(SHAPES, 3, 2, generator)
    for name, (n, m) in SHAPES.items():
        U, V = start[name]
        assert (U.shape, V.shape) == ((3, n, 2), (3, m, 2))
        assert 0.5 * m**-0.5 < V.abs().max() <= m**-0.5
    torch.testing.assert_close(
        denoiser.denoise(base, noisy, time, start), denoiser.denoise(base, noisy, time)
    )


def finetune(base, start, rate, steps, images, rates=(1.0, 1.0)):
    draws = torch.Generator().manual_seed(1)
    return adam.finetune(
        start,
        lambda factors, _: denoiser.noise_loss(base, images, draws, factors),
        rates=rates,
        learning_rate=torch.tensor(rate),
        n_steps=torch.tensor(steps),
    )


def fixed_loss(base, images, factors=None):
    """The loss at the same times and noises, whatever the factors."""
    draws = torch.Generator().manual_seed(2)
    return denoiser.noise_loss(base, images.repeat(1, 20, 1), draws, factors)


def test_finetuning_lowers_the_loss_of_every_adapter(base, generator):
    images = torch.sign(torch.randn(3, 4, 64, generator=generator))
    start = denoiser.init_factors(SHAPES, 3, 2, generator)
    kept = {name: weight.clone() for name, weight in base.items()}
    found = finetune(base, start, [1e-2] * 3, [60] * 3, images)
    assert (fixed_loss(base, images, found) < 0.8 * fixed_loss(base, images, start)).all()
    assert all(torch.equal(base[name], weight) for name, weight in kept.items())
    assert all(torch.count_nonzero(U) == 0 for U, _ in start.values())
    assert not any(t.requires_grad for pair in found.values() for t in pair)


def test_finetuning_is_adam(base, generator):
    images = torch.randn(1, 4, 64, generator=generator)
    start = denoiser.init_factors(SHAPES, 1, 2, generator)
    found = finetune(base, start, [1e-2], [5], images)

    flat = [t.clone().requires_grad_() for pair in start.values() for t in pair]
    optimizer = torch.optim.Adam(flat, lr=1e-2)
    draws = torch.Generator().manual_seed(1)
    for _ in range(5):
        adapters = dict(zip(start, zip(flat[::2], flat[1::2], strict=True), strict=True))
        optimizer.zero_grad()
        denoiser.noise_loss(base, images, draws, adapters).sum().backward()
        optimizer.step()
    for (U, V), U_adam, V_adam in zip(found.values(), flat[::2], flat[1::2], strict=True):
        torch.testing.assert_close(U, U_adam.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(V, V_adam.detach(), rtol=1e-3, atol=1e-5)


def test_each_factor_has_its_learning_rate(base, generator):
    images = torch.randn(1, 4, 64, generator=generator)
    start = denoiser.init_factors(SHAPES, 1, 2, generator)
    found = finetune(base, start, [1e-2], [1], images, rates=(4.0, 0.0))
    twice = finetune(base, start, [4e-2], [1], images)
    for (U, V), (U_twice, _), (_, V_start) in zip(
        found.values(), twice.values(), start.values(), strict=True
    ):
        torch.testing.assert_close(U, U_twice)
        assert torch.equal(V, V_start)


def test_an_adapter_stops_after_its_own_steps(base, generator):
    images = torch.randn(2, 4, 64, generator=generator)
    start = denoiser.init_factors(SHAPES, 2, 2, generator)
    short = finetune(base, start, [1e-2, 1e-2], [2, 2], images)
    mixed = finetune(base, start, [1e-2, 1e-2], [2, 6], images)
    for name in SHAPES:
        for factor, stopped in zip(mixed[name], short[name], strict=True):
            assert torch.equal(factor[0], stopped[0])
            assert not torch.allclose(factor[1], stopped[1])


def test_adapters_of_a_stack_do_not_meet(base, generator):
    images = torch.randn(2, 4, 64, generator=generator)
    start = denoiser.init_factors(SHAPES, 2, 2, generator)
    found = finetune(base, start, [1e-2, 1e-2], [4, 4], images)
    images[1] = -images[1]
    other = finetune(base, start, [1e-2, 5e-2], [4, 4], images)
    for name in SHAPES:
        for factor, same in zip(other[name], found[name], strict=True):
            torch.testing.assert_close(factor[0], same[0])
            assert not torch.allclose(factor[1], same[1])


def test_the_base_network_learns(generator):
    images = torch.sign(torch.randn(20, 64, generator=generator))
    options = {"dim": DIM, "depth": 1}
    first = denoiser.train_base(images, n_steps=1, generator=generator, **options)
    last = denoiser.train_base(images, n_steps=200, generator=generator, **options)

    assert fixed_loss(last, images[None]) < 0.8 * fixed_loss(first, images[None])
    assert not any(weight.requires_grad for weight in last.values())


def a_denoiser_of_images(images):
    """The best guess of the noise when the image is known."""

    def denoise(base, noisy, time, factors):
        angle = (time * (torch.pi / 2)).unsqueeze(-1)
        return (noisy - torch.cos(angle) * images) / torch.sin(angle)

    return denoise


def test_a_perfect_denoiser_draws_its_image(generator, monkeypatch):
    images = torch.rand(3, 1, 64, generator=generator) * 2 - 1
    monkeypatch.setattr(denoiser, "denoise", a_denoiser_of_images(images))
    noise = torch.randn(3, 5, 64, generator=generator)
    found = denoiser.sample({}, noise, 4)
    torch.testing.assert_close(found, images.expand(3, 5, 64), rtol=1e-4, atol=1e-4)


def test_samples_are_of_the_distribution_that_the_denoiser_knows(generator, monkeypatch):
    """Of a normal distribution, whose deterministic sampler is a linear map of the noise."""
    mean, std = 0.2, 0.1

    def denoise(base, noisy, time, factors):
        angle = (time * (torch.pi / 2)).unsqueeze(-1)
        variance = torch.cos(angle) ** 2 * std**2 + torch.sin(angle) ** 2
        return torch.sin(angle) * (noisy - torch.cos(angle) * mean) / variance

    monkeypatch.setattr(denoiser, "denoise", denoise)
    noise = torch.randn(2, 40, 64, generator=generator, dtype=torch.float64)
    errors = [
        (denoiser.sample({}, noise, n) - (mean + std * noise)).abs().max() for n in (10, 100, 400)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1 * std


def test_samples_are_decided_by_their_noise(base, factors, noisy):
    found = denoiser.sample(base, noisy, 3, factors)
    assert found.shape == noisy.shape
    assert found.abs().max() <= 1
    assert torch.equal(found, denoiser.sample(base, noisy, 3, factors))
    own = {name: (U[1:2], V[1:2]) for name, (U, V) in factors.items()}
    alone = denoiser.sample(base, noisy[1:2, 2:3], 3, own)
    torch.testing.assert_close(found[1:2, 2:3], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, denoiser.sample(base, noisy, 3))


def test_the_network_is_asked_at_evenly_spread_times(monkeypatch):
    asked = []
    monkeypatch.setattr(
        denoiser, "denoise", lambda base, x, time, factors: asked.append(time) or 0 * x
    )
    denoiser.sample({}, torch.zeros(1, 2, 64), 4)
    assert [time.tolist() for time in asked] == [[[t, t]] for t in (0.875, 0.625, 0.375, 0.125)]
