"""Methods of finetuning: what is trained, what the network computes, what a row holds of it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from sklora.collection import LoRALayout
from sklora.datasets._adam import Parameters
from sklora.datasets._denoiser import Factors, Weights, init_factors

Shapes = Mapping[str, tuple[int, int]]


class LoRA:
    """``dW = U V^T`` from ``U = 0`` and a random ``V`` (Hu et al., 2021)."""

    rates: ClassVar[tuple[float, ...]] = (1.0, 1.0)  # times the learning rate: U, V, ...

    def start(
        self, base: Weights, shapes: Shapes, n_adapters: int, rank: int, generator: torch.Generator
    ) -> Parameters:
        """Give parameters to train, ``(n_adapters, ...)`` each, by module."""
        return dict(init_factors(shapes, n_adapters, rank, generator))

    def factors(self, base: Weights, parameters: Parameters) -> Factors:
        """Give ``(U, V)`` of the update ``U V^T`` that parameters are to each module."""
        return {name: (U, V) for name, (U, V, *_) in parameters.items()}

    def layout(self, shapes: Shapes, rank: int) -> LoRALayout:
        """Say what a row holds."""
        return LoRALayout([(name, n, m, rank) for name, (n, m) in shapes.items()])

    def rows(self, base: Weights, parameters: Parameters) -> Tensor:
        """Give flat rows ``(n_adapters, width)``."""
        return _flat(chain.from_iterable(self.factors(base, parameters).values()))


class LoRAPlus(LoRA):
    """LoRA with a learning rate of ``U`` that is 16 times that of ``V`` (Hayou et al., 2024)."""

    rates = (4.0, 0.25)


class PiSSA(LoRA):
    """LoRA from the first singular directions of ``W`` (Meng et al., 2024).

    The frozen part is ``W`` without them. Relative to ``W``, the update has twice the rank:
    ``U V^T - U0 V0^T``, as PEFT converts it to plain LoRA.
    """

    def start(
        self, base: Weights, shapes: Shapes, n_adapters: int, rank: int, generator: torch.Generator
    ) -> Parameters:
        return {
            name: tuple(factor.expand(n_adapters, -1, -1) for factor in principal(base[name], rank))
            for name in shapes
        }

    def factors(self, base: Weights, parameters: Parameters) -> Factors:
        moved = {}
        for name, (U, V) in parameters.items():
            U0, V0 = (t.expand(len(U), -1, -1) for t in principal(base[name], U.shape[2]))
            moved[name] = torch.cat([U, -U0], dim=2), torch.cat([V, V0], dim=2)
        return moved

    def layout(self, shapes: Shapes, rank: int) -> LoRALayout:
        return super().layout(shapes, 2 * rank)


class DoRA(LoRA):
    """``W' = magnitude * (W + U V^T) / |W + U V^T|``, row by row (Liu et al., 2024, eq. 5).

    A row holds ``U`` and ``V``, and the magnitudes as side features. As in the paper's section
    4.3, the norm passes no gradient.
    """

    rates = (1.0, 1.0, 1.0)

    def start(
        self, base: Weights, shapes: Shapes, n_adapters: int, rank: int, generator: torch.Generator
    ) -> Parameters:
        factors = super().start(base, shapes, n_adapters, rank, generator)
        return {
            name: (*pair, _row_norms(base[name]).expand(n_adapters, -1, -1))
            for name, pair in factors.items()
        }

    def factors(self, base: Weights, parameters: Parameters) -> Factors:
        moved = {}
        for name, (U, V, magnitude) in parameters.items():
            direction = base[name] + U @ V.mT
            weight = magnitude * direction / _row_norms(direction.detach())
            moved[name] = as_factors(weight - base[name])
        return moved

    def layout(self, shapes: Shapes, rank: int) -> LoRALayout:
        plain = super().layout(shapes, rank)
        side = [(f"{name}:magnitude_out", n) for name, (n, _) in shapes.items()]
        return LoRALayout(plain.modules, side=side)

    def rows(self, base: Weights, parameters: Parameters) -> Tensor:
        trained = parameters.values()
        pairs = chain.from_iterable((U, V) for U, V, _ in trained)
        return _flat(chain(pairs, (magnitude for _, _, magnitude in trained)))


class LoKr(LoRA):
    """``dW = A kron B`` from ``A = 0`` and a random ``B`` (Yeh et al., 2024).

    As in appendix E of the paper, a row holds ``U = vec(A)`` and ``V = vec(B)``: an update of rank
    1 has the gauge group of the Kronecker product, GL(1).
    """

    def start(
        self, base: Weights, shapes: Shapes, n_adapters: int, rank: int, generator: torch.Generator
    ) -> Parameters:
        started: Parameters = {}
        for name, (n, m) in shapes.items():
            (a, b), (c, d) = _kronecker_shapes(n, m)
            B = torch.rand(n_adapters, c, d, generator=generator) * 2 - 1
            started[name] = torch.zeros(n_adapters, a, b), B / d**0.5
        return started

    def factors(self, base: Weights, parameters: Parameters) -> Factors:
        return {
            name: as_factors(torch.einsum("zab,zcd->zacbd", A, B).flatten(3, 4).flatten(1, 2))
            for name, (A, B) in parameters.items()
        }

    def layout(self, shapes: Shapes, rank: int) -> LoRALayout:
        sizes = {name: _kronecker_shapes(n, m) for name, (n, m) in shapes.items()}
        return LoRALayout([(name, a * b, c * d, 1) for name, ((a, b), (c, d)) in sizes.items()])

    def rows(self, base: Weights, parameters: Parameters) -> Tensor:
        return _flat(chain.from_iterable(parameters.values()))


METHODS: dict[str, LoRA] = {
    "lora": LoRA(),
    "lora+": LoRAPlus(),
    "pissa": PiSSA(),
    "dora": DoRA(),
    "lokr": LoKr(),
}


def principal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Give balanced factors ``(n, r)``, ``(m, r)`` of the best approximation of that rank."""
    U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return U[:, :rank] * root, Vh[:rank].mT * root


def as_factors(update: Tensor) -> tuple[Tensor, Tensor]:
    """Give updates ``(n_adapters, n, m)`` as factors of full rank."""
    eye = torch.eye(update.shape[2], dtype=update.dtype)
    return update, eye.expand(len(update), -1, -1)


def _row_norms(weight: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return norms


def _kronecker_shapes(n: int, m: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of both parts, each nearly square: the largest divisors up to the roots."""
    a, b = (max(d for d in range(1, int(k**0.5) + 1) if k % d == 0) for k in (n, m))
    return (a, b), (n // a, m // b)


def _flat(tensors: chain[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)
