from __future__ import annotations

import math

import numpy as np
import torch

from sklora.datasets._adam import train_network


def test_networks_are_trained_by_adam_with_a_cosine():
    weights, steps = {"w": torch.tensor([1.0, -3.0], dtype=torch.float64)}, []
    trained = train_network(
        weights,
        lambda: weights["w"].pow(4).sum(),
        learning_rate=0.1,
        n_steps=6,
        progress=lambda: steps.append(weights["w"].tolist()),
    )
    w, first, second = np.array([1.0, -3.0]), 0.0, 0.0
    for step, found in enumerate(steps):
        gradient = 4 * w**3
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        move = first / (1 - 0.9 ** (step + 1))
        move /= np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
        w = w - 0.1 * (1 + math.cos(math.pi * step / 6)) / 2 * move
        np.testing.assert_allclose(found, w, rtol=1e-6)
    assert len(steps) == 6
    assert trained["w"].tolist() == steps[-1]
    assert not trained["w"].requires_grad
