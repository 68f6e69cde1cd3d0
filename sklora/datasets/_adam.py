"""Adam (Kingma and Ba, 2015), for a network, and for a stack of adapters each with its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Parameters = dict[str, tuple[Tensor, ...]]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def train_network(
    weights: Mapping[str, Tensor],
    loss: Callable[[], Tensor],
    *,
    learning_rate: float,
    n_steps: int,
    progress: Callable[[], object],
) -> dict[str, Tensor]:
    """Train all weights of a network in place, with a cosine step size; give them as they are then.

    ``loss()`` is that of a new batch, and `progress` is called after each step.
    """
    parameters = [weight.requires_grad_() for weight in weights.values()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress()
    return {name: weight.detach() for name, weight in weights.items()}


def finetune(
    parameters: Mapping[str, tuple[Tensor, ...]],
    losses: Callable[[Parameters, int], Tensor],
    *,
    learning_rate: Tensor,
    n_steps: Tensor,
    weight_decay: Tensor | None = None,
    rates: Sequence[float] = (1.0, 1.0),
) -> Parameters:
    """Train copies of the parameters of a stack of adapters.

    Adapters do not meet: ``torch.optim.AdamW`` would do the same to each alone, but it takes one
    learning rate for all.

    Parameters
    ----------
    parameters : mapping of str to tuple of Tensor of shape (n_adapters, n, r)
        What is trained of every module, where it starts.
    losses : callable
        ``losses(parameters, step)`` of each adapter, for steps 0, 1, ...
    learning_rate : Tensor of shape (n_adapters,)
    n_steps : int Tensor of shape (n_adapters,)
        An adapter stands still once it has made its own number of steps.
    weight_decay : Tensor of shape (n_adapters,) or None
        Decoupled from the gradients (Loshchilov and Hutter, 2019). None is no decay.
    rates : sequence of float
        Times the learning rate, for each parameter of a module.

    Returns
    -------
    dict of str to tuple of Tensor
    """
    trained = {name: tuple(t.clone() for t in each) for name, each in parameters.items()}
    flat = [t.requires_grad_() for each in trained.values() for t in each]
    first, second = ([torch.zeros_like(t) for t in flat] for _ in range(2))
    every_rate = [*rates] * len(trained)
    for step in range(int(n_steps.max())):
        found = torch.autograd.grad(losses(trained, step).sum(), flat)
        rate = (learning_rate * (step < n_steps)).view(-1, 1, 1)
        kept = None if weight_decay is None else 1 - rate * weight_decay.view(-1, 1, 1)
        with torch.no_grad():
            for t, g, m1, m2, times in zip(flat, found, first, second, every_rate, strict=True):
                if kept is not None:
                    t *= kept
                m1.lerp_(g, 1 - BETA1)
                m2.lerp_(g.square(), 1 - BETA2)
                scale = m2.div(1 - BETA2 ** (step + 1)).sqrt_().add_(EPSILON)
                t -= times * rate * (m1 / (1 - BETA1 ** (step + 1))) / scale
    return {name: tuple(t.detach() for t in each) for name, each in trained.items()}
