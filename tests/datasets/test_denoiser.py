from __future__ import annotations

import pytest
import torch

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


def test_patches_round_trip():
    images = torch.randn(2, 3, 64)
    patches = denoiser._patches(images)
    assert patches.shape == (2, 3, 16, 4)
    assert torch.equal(patches[0, 0, 0], images[0, 0].reshape(8, 8)[:2, :2].flatten())
    assert torch.equal(denoiser._images(patches), images)


def test_noise_comes_with_time():
    images, noise = torch.randn(2, 64), torch.randn(2, 64)
    noisy = denoiser.add_noise(images, torch.tensor([0.0, 1.0]), noise)
    torch.testing.assert_close(noisy[0], images[0])
    torch.testing.assert_close(noisy[1], noise[1])


def test_factors_are_the_update_of_the_weight(base, factors):
    noisy, time = torch.randn(3, 5, 64), torch.rand(3, 5)
    together = denoiser.denoise(base, noisy, time, factors)
    for i in range(3):
        merged = base | {name: base[name] + U[i] @ V[i].T for name, (U, V) in factors.items()}
        alone = denoiser.denoise(merged, noisy[i : i + 1], time[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_adapters_start_as_no_update(base, generator):
    start = denoiser.init_factors(SHAPES, 3, 2, generator)
    noisy, time = torch.randn(3, 5, 64), torch.rand(3, 5)
    torch.testing.assert_close(
        denoiser.denoise(base, noisy, time, start), denoiser.denoise(base, noisy, time)
    )


def finetune(base, start, rate, steps, images):
    return denoiser.finetune(
        base,
        start,
        lambda: images,
        learning_rate=torch.tensor(rate),
        n_steps=torch.tensor(steps),
        generator=torch.Generator().manual_seed(1),
    )


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
        denoiser._loss(base, images, draws, adapters).sum().backward()
        optimizer.step()
    for (U, V), U_adam, V_adam in zip(found.values(), flat[::2], flat[1::2], strict=True):
        torch.testing.assert_close(U, U_adam.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(V, V_adam.detach(), rtol=1e-3, atol=1e-5)


def test_an_adapter_stops_after_its_own_steps(base, generator):
    images = torch.randn(2, 4, 64, generator=generator)
    start = denoiser.init_factors(SHAPES, 2, 2, generator)
    short = finetune(base, start, [1e-2, 1e-2], [2, 2], images)
    mixed = finetune(base, start, [1e-2, 1e-2], [2, 6], images)
    for name in SHAPES:
        torch.testing.assert_close(mixed[name][0][0], short[name][0][0])
        assert not torch.allclose(mixed[name][0][1], short[name][0][1])


def test_the_base_network_learns(generator):
    images = torch.sign(torch.randn(20, 64, generator=generator))
    options = {"dim": DIM, "depth": 1, "batch_size": 32}
    first = denoiser.train_base(images, n_steps=1, generator=generator, **options)
    last = denoiser.train_base(images, n_steps=200, generator=generator, **options)

    def loss(base):
        draws = torch.Generator().manual_seed(2)
        return float(denoiser._loss(base, images[None].repeat(1, 20, 1), draws))

    assert loss(last) < 0.8 * loss(first)
