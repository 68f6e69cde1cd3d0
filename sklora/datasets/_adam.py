"""Adam for a stack of adapters, each with settings of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def descend(
    parameters: Sequence[Tensor],
    gradients: Callable[[int], Sequence[Tensor]],
    *,
    learning_rate: Tensor,
    n_steps: Tensor,
    weight_decay: Tensor | None = None,
    rates: Sequence[float] | None = None,
) -> None:
    """Train parameters in place with Adam (Kingma and Ba, 2015).

    Adapters do not meet: ``torch.optim.AdamW`` would do the same to each alone, but it takes one
    learning rate for all.

    Parameters
    ----------
    parameters : sequence of Tensor of shape (n_adapters, n, r)
    gradients : callable
        ``gradients(step)``, of the shapes of the parameters, for steps 0, 1, ...
    learning_rate : Tensor of shape (n_adapters,)
    n_steps : int Tensor of shape (n_adapters,)
        An adapter stands still once it has made its own number of steps.
    weight_decay : Tensor of shape (n_adapters,) or None
        Decoupled from the gradients (Loshchilov and Hutter, 2019). None is no decay.
    rates : sequence of float or None
        Times the learning rate, for each of the parameters. None is 1.
    """
    first = [torch.zeros_like(t) for t in parameters]
    second = [torch.zeros_like(t) for t in parameters]
    rates = [1.0] * len(parameters) if rates is None else rates
    for step in range(int(n_steps.max())):
        found = gradients(step)
        rate = (learning_rate * (step < n_steps)).view(-1, 1, 1)
        kept = None if weight_decay is None else 1 - rate * weight_decay.view(-1, 1, 1)
        with torch.no_grad():
            for t, g, m1, m2, times in zip(parameters, found, first, second, rates, strict=True):
                if kept is not None:
                    t *= kept
                m1.lerp_(g, 1 - BETA1)
                m2.lerp_(g.square(), 1 - BETA2)
                scale = m2.div(1 - BETA2 ** (step + 1)).sqrt_().add_(EPSILON)
                t -= times * rate * (m1 / (1 - BETA1 ** (step + 1))) / scale
