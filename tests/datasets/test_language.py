from __future__ import annotations

import numpy as np
import pytest
import torch

from sklora.datasets import _language as language
from sklora.datasets._adam import finetune as finetune_stack
from sklora.datasets._denoiser import init_factors
from sklora.testing import random_gauge

DIM, DEPTH, RANK, N_SYMBOLS, CONTEXT = 8, 2, 2, 11, 6
SHAPES = language.module_shapes(DIM, DEPTH)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def base(generator):
    drawn = language.init_base(N_SYMBOLS, CONTEXT, DIM, DEPTH, generator)
    return {name: weight.double() for name, weight in drawn.items()}


@pytest.fixture
def factors(generator):
    return {
        name: tuple(0.5 * torch.randn(3, size, RANK, generator=generator).double() for size in nm)
        for name, nm in SHAPES.items()
    }


@pytest.fixture
def texts(generator):
    return torch.randint(N_SYMBOLS, (3, 4, CONTEXT + 1), generator=generator)


def merged(base, factors, i):
    return dict(base) | {name: base[name] + U[i] @ V[i].T for name, (U, V) in factors.items()}


def test_modules_that_take_an_adapter(base):
    assert list(SHAPES) == [
        f"layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "kv"
    ]
    assert all(base[name].shape == shape for name, shape in SHAPES.items())


def test_weights_keep_the_size_of_what_they_act_on(base):
    for name, weight in base.items():
        assert weight.square().sum(dim=1).mean().item() == pytest.approx(1.0, rel=0.5), name


def test_factors_are_the_update_of_the_weight(base, factors, texts):
    together = language.logits(base, texts[..., :-1], factors)
    assert together.shape == (3, 4, CONTEXT, N_SYMBOLS)
    for i in range(3):
        alone = language.logits(merged(base, factors, i), texts[i : i + 1, :, :-1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_adapters_alone(base, factors, texts):
    flat = [t.requires_grad_() for pair in factors.values() for t in pair]
    together = language.losses(language.logits(base, texts[..., :-1], factors), texts)
    found = torch.autograd.grad(together.sum(), flat)
    for i in range(3):
        own = texts[i : i + 1]
        alone = language.losses(language.logits(merged(base, factors, i), own[..., :-1]), own)
        for got, expected in zip(found, torch.autograd.grad(alone.sum(), flat), strict=True):
            torch.testing.assert_close(got[i], expected[i], rtol=1e-9, atol=1e-12)
            assert got[i].abs().max() > 1e-6


def test_a_gauge_changes_nothing(base, factors, texts):
    turned = {}
    for seed, (name, (U, V)) in enumerate(factors.items()):
        R = torch.from_numpy(random_gauge(RANK, condition=1e4, size=3, random_state=seed))
        turned[name] = (U @ R, V @ torch.linalg.inv(R).mT)
        assert not torch.allclose(turned[name][0], U)
    symbols = texts[..., :-1]
    torch.testing.assert_close(
        language.logits(base, symbols, turned),
        language.logits(base, symbols, factors),
        rtol=1e-8,
        atol=1e-8,
    )


def test_no_symbol_sees_those_after_it(base, factors, texts):
    symbols = texts[..., :-1]
    later = symbols.clone()
    later[..., 3] = (later[..., 3] + 1) % N_SYMBOLS
    found, changed = (language.logits(base, s, factors) for s in (symbols, later))
    torch.testing.assert_close(changed[..., :3, :], found[..., :3, :], rtol=0, atol=1e-12)
    assert ((changed - found)[..., 3:, :].abs().amax(dim=(0, 1, 3)) > 1e-3).all()


@pytest.mark.parametrize("name", SHAPES)
def test_every_module_matters(name, base, factors, texts):
    symbols = texts[..., :-1]
    found = language.logits(base, symbols, {name: factors[name]})
    assert (found - language.logits(base, symbols)).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_loss_is_the_surprise_at_the_next_symbol(base, factors, texts):
    scores = language.logits(base, texts[..., :-1], factors)
    chances = scores.softmax(dim=-1).gather(-1, texts[..., 1:, None]).squeeze(-1)
    expected = -chances.log().mean(dim=(1, 2))
    torch.testing.assert_close(language.losses(scores, texts), expected)


def test_evaluation_of_every_adapter_on_every_group(base, factors, texts):
    groups = torch.stack([texts[0], texts[1]])
    loss, accuracy = language.evaluate(base, groups, factors)
    assert loss.shape == accuracy.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            scores = language.logits(merged(base, factors, i), groups[j : j + 1, :, :-1])
            right = scores.argmax(dim=-1) == groups[j : j + 1, :, 1:]
            torch.testing.assert_close(accuracy[i, j], right.float().mean())
            expected = language.losses(scores, groups[j : j + 1])
            torch.testing.assert_close(loss[i : i + 1, j], expected)
    again, _ = language.evaluate(base, groups, factors)
    assert torch.equal(loss, again)  # nothing is dropped


def test_dropout_has_a_rate_for_each_adapter(generator):
    drop = language.dropout(torch.tensor([0.0, 0.2, 0.5]), generator)
    dropped = drop(torch.ones(3, 10, 10, 100))
    assert torch.equal(dropped[0], torch.ones(10, 10, 100))
    for i, rate in ((1, 0.2), (2, 0.5)):
        np.testing.assert_allclose(dropped[i].unique().numpy(), [0, 1 / (1 - rate)], rtol=1e-6)
        assert dropped[i].mean().item() == pytest.approx(1.0, abs=0.05)
    assert not torch.equal(drop(torch.ones(3, 10, 10, 100)), dropped)


def test_what_is_dropped_enters_the_update_alone(base, factors, texts):
    symbols = texts[..., :-1]
    found = language.logits(base, symbols, factors, drop=torch.zeros_like)
    torch.testing.assert_close(found, language.logits(base, symbols), rtol=0, atol=1e-12)


class TestFinetune:
    RATES, DECAYS, STEPS = (1e-2, 3e-2, 1e-2), (0.0, 0.5, 2.0), (7, 7, 3)

    def start(self, generator):
        return [torch.randn(3, 4, 2, generator=generator).double() for _ in range(2)]

    def losses(self, parameters, step):
        """They change with the steps, adapter by adapter."""
        return sum((p - step - k).pow(4).sum((1, 2)) for k, p in enumerate(parameters))

    def finetuned(self, start, **options):
        found = finetune_stack(
            {"module": start},
            lambda trained, step: self.losses(trained["module"], step),
            **{
                "learning_rate": torch.tensor(self.RATES).double(),
                "n_steps": torch.tensor(self.STEPS),
                **options,
            },
        )
        return found["module"]

    @pytest.mark.parametrize("decays", [DECAYS, None])
    def test_is_adamw_of_each_adapter_alone(self, decays, generator):
        start = self.start(generator)
        decay = None if decays is None else torch.tensor(decays).double()
        found = self.finetuned(start, weight_decay=decay)
        for i in range(3):
            alone = [p[i].clone().requires_grad_() for p in start]
            optimizer = torch.optim.AdamW(
                alone, lr=self.RATES[i], weight_decay=0.0 if decays is None else decays[i]
            )
            for step in range(self.STEPS[i]):
                optimizer.zero_grad()
                self.losses([p[None] for p in alone], step).sum().backward()
                optimizer.step()
            for together, own in zip(found, alone, strict=True):
                torch.testing.assert_close(together[i], own.detach(), rtol=1e-6, atol=1e-8)

    def test_an_adapter_stands_still_after_its_own_steps(self, generator):
        start = self.start(generator)
        decay = torch.tensor(self.DECAYS).double()
        mixed = self.finetuned(start, weight_decay=decay)
        short = self.finetuned(start, weight_decay=decay, n_steps=torch.tensor([3, 3, 3]))
        for found, stopped in zip(mixed, short, strict=True):
            assert torch.equal(found[2], stopped[2])
            assert not torch.allclose(found[0], stopped[0])


def finetune(base, start, texts, **options):
    return language.finetune(
        base,
        start,
        lambda step: texts,
        **{
            "learning_rate": torch.full((3,), 1e-2),
            "weight_decay": torch.full((3,), 1e-2),
            "lora_dropout": torch.full((3,), 0.1),
            "n_steps": torch.full((3,), 40),
            "generator": torch.Generator().manual_seed(1),
            **options,
        },
    )


@pytest.fixture
def single(base):
    return {name: weight.float() for name, weight in base.items()}


def test_finetuning_lowers_the_loss_of_every_adapter(single, texts, generator):
    start = init_factors(SHAPES, 3, RANK, generator)
    kept = {name: weight.clone() for name, weight in single.items()}
    found = finetune(single, start, texts)

    def loss(factors):
        return language.losses(language.logits(single, texts[..., :-1], factors), texts)

    assert (loss(found) < 0.9 * loss(start)).all()
    assert all(torch.equal(single[name], weight) for name, weight in kept.items())
    assert all(torch.count_nonzero(U) == 0 for U, _ in start.values())
    assert not any(t.requires_grad for pair in found.values() for t in pair)


def test_adapters_of_a_stack_do_not_meet(single, texts, generator):
    start = init_factors(SHAPES, 3, RANK, generator)
    found = finetune(single, start, texts, n_steps=torch.full((3,), 4))
    texts = torch.stack([texts[0], texts[0], texts[2]])
    other = finetune(
        single,
        start,
        texts,
        n_steps=torch.tensor([4, 4, 2]),
        learning_rate=torch.tensor([1e-2, 1e-2, 2e-2]),
    )
    for name in SHAPES:
        for factor, same in zip(other[name], found[name], strict=True):
            torch.testing.assert_close(factor[0], same[0])
            assert not torch.allclose(factor[1], same[1])
            assert not torch.allclose(factor[2], same[2])


@pytest.mark.parametrize("option", ["learning_rate", "weight_decay", "lora_dropout"])
def test_every_hyperparameter_counts(option, single, texts, generator):
    start = init_factors(SHAPES, 3, RANK, generator)
    few = {"n_steps": torch.full((3,), 4)}
    first = finetune(single, start, texts, **few)
    other = finetune(single, start, texts, **few, **{option: torch.tensor([0.0, 0.3, 0.5])})
    for name in SHAPES:
        for i in range(3):
            assert not torch.equal(first[name][0][i], other[name][0][i])


def test_the_base_network_learns(generator):
    book = torch.arange(40) % N_SYMBOLS

    def draw(n):
        starts = torch.randint(30, (n, 1), generator=generator)
        return book[starts + torch.arange(CONTEXT + 1)]

    options = {"n_symbols": N_SYMBOLS, "context": CONTEXT, "dim": DIM, "depth": 1}
    first = language.train_base(draw, n_steps=1, generator=generator, **options)
    last = language.train_base(draw, n_steps=200, generator=generator, **options)
    texts = draw(10)[None]

    def loss(base):
        return language.losses(language.logits(base, texts[..., :-1]), texts)

    assert loss(last) < 0.5 * loss(first)
    assert not any(weight.requires_grad for weight in last.values())
