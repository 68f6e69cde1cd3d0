"""Random factors and gauges for the kernels.

Everything is drawn and gauged in float64 and rounded once, so that a float32 test compares a kernel
with the dense float64 answer for the very numbers that it was given.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

# The worst gauge each precision is held to.
CONDITION = {torch.float32: 1e2, torch.float64: 1e4}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def condition(dtype) -> float:
    return CONDITION[dtype]


@pytest.fixture(scope="session")
def make_factors() -> Callable[..., tuple[Tensor, Tensor]]:
    """(seed, n, m, r, batch=(), dtype) -> Gaussian factors."""

    def make(seed, n, m, r, *, batch=(), dtype=torch.float64):
        rng = np.random.default_rng(seed)
        U = torch.from_numpy(rng.standard_normal((*batch, n, r)))
        V = torch.from_numpy(rng.standard_normal((*batch, m, r)))
        return U.to(dtype), V.to(dtype)

    return make


@pytest.fixture(scope="session")
def make_gauge() -> Callable[..., Tensor]:
    """(seed, r, condition, batch=()) -> invertible float64 matrices of exactly that condition."""

    def make(seed, r, condition, *, batch=()):
        rng = np.random.default_rng(seed)
        left = torch.linalg.qr(torch.from_numpy(rng.standard_normal((*batch, r, r)))).Q
        right = torch.linalg.qr(torch.from_numpy(rng.standard_normal((*batch, r, r)))).Q
        half = np.log10(condition) / 2
        values = torch.logspace(half, -half, r, dtype=torch.float64)
        return left @ (values[:, None] * right)

    return make
