"""Module-major factors and gauges of a stated condition number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import pytest
import torch
from torch import Tensor

Factors = list[tuple[Tensor, Tensor]]
Group = tuple[int, int, int]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def block_entries(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    # Not by its dotted name, under which the package holds the function of that name.
    module = import_module("sklora.nets.feedforward")
    return lambda entries: monkeypatch.setattr(module, "BLOCK_ENTRIES", entries)


@pytest.fixture
def random_factors(generator: torch.Generator) -> Callable[..., Factors]:
    def make(
        groups: Sequence[Group], batch: int, rank: int, dtype: torch.dtype = torch.float64
    ) -> Factors:
        return [
            (
                torch.randn(members, n, batch, rank, generator=generator, dtype=dtype),
                torch.randn(members, m, batch, rank, generator=generator, dtype=dtype),
            )
            for members, n, m in groups
        ]

    return make


@pytest.fixture
def random_gauges(generator: torch.Generator) -> Callable[[Tensor, float], Tensor]:
    """Gauges (M, B, r, r) of the given condition number, one for each module of each adapter."""

    def make(U: Tensor, condition: float) -> Tensor:
        members, _, batch, rank = U.shape

        def orthogonal() -> Tensor:
            normal = torch.randn(
                members, batch, rank, rank, generator=generator, dtype=torch.float64
            )
            return torch.linalg.qr(normal).Q

        stretch = torch.logspace(0, -1, rank, base=condition, dtype=torch.float64)
        return orthogonal() @ (stretch[:, None] * orthogonal())

    return make


@pytest.fixture
def turn() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The gauge action on module-major factors, in the dtype of the gauge."""

    def act(U: Tensor, V: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        inverse = torch.linalg.inv(R)
        return (
            torch.einsum("anbr,abrs->anbs", U.to(R.dtype), R),
            torch.einsum("ambr,absr->ambs", V.to(R.dtype), inverse),
        )

    return act
