"""The featurizers against the cheapest pass that sees every number: float32 Gram matrices.

Times, in turn in one process, of 64 adapters with one square module in memory: SVDSpectrum, OAlign
and GLEquivariantProjection by `fit_transform` or `transform`, with everything that they check;
`torch.bmm` of the same factors, as separate arrays that are ready. SVDSpectrum and OAlign of one
adapter of 560 small modules, against their kernels on every module by itself. Prints the ratios of
the best times, which other work on the machine disturbs least.
``python benchmarks/bench_featurizers.py``
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.utils.extmath import randomized_svd
from timing import print_ratios

from sklora import (
    GLEquivariantProjection,
    LoRACollection,
    LoRALayout,
    OAlign,
    SVDSpectrum,
)
from sklora.linalg import procrustes, spectrum

N_ADAPTERS, N_COMPONENTS = 64, 32


def zoo(n: int, rank: int) -> tuple[LoRACollection, torch.Tensor, torch.Tensor]:
    """Give adapters of gauges of condition 1e2, as a collection and as two stacks of factors."""
    torch.manual_seed(0)
    layout = LoRALayout([("q", n, n, rank)])
    A, B = (torch.linalg.qr(torch.randn(N_ADAPTERS, rank, rank).double()).Q for _ in range(2))
    values = torch.logspace(0, 2, rank, dtype=torch.float64)
    R, R_inverse = A * values @ B.mT, A / values @ B.mT
    U = (torch.randn(N_ADAPTERS, n, rank).double() @ R).float()
    V = (torch.randn(N_ADAPTERS, n, rank).double() @ R_inverse).float()
    flat = layout.pack([(U[:, None].numpy(), V[:, None].numpy())])
    return LoRACollection.from_array(flat, layout, ranks=np.full((N_ADAPTERS, 1), rank)), U, V


def best_ratio(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> float:
    """Time the two in turn, each after a run of it that does not count."""
    times = np.empty((repeats, 2))
    for row in times:
        for place, function in enumerate((ours, theirs)):
            # The threads of another library, which have just worked, may still wait for more.
            function()
            start = time.perf_counter()
            function()
            row[place] = time.perf_counter() - start
    ours_best, theirs_best = times.min(axis=0)
    return float(ours_best / theirs_best)


def gram_pass(U: torch.Tensor, V: torch.Tensor) -> None:
    """See every number once, as cheaply as can be."""
    torch.bmm(U.mT, U)
    torch.bmm(V.mT, V)


def ratios_at(n: int, rank: int, repeats: int) -> dict[str, float]:
    """Give the ratios for one size."""
    X, U, V = zoo(n, rank)
    size = f"n={n} r={rank}"
    aligned, projected = OAlign(template=0), GLEquivariantProjection(N_COMPONENTS, random_state=0)
    aligned.fit(X)
    projected.fit(X)
    P, Q = (
        torch.from_numpy(matrices["q"]).expand(N_ADAPTERS, -1, -1)
        for matrices in (projected.left_, projected.right_)
    )
    return {
        f"spectrum / Gram {size}": best_ratio(
            lambda: SVDSpectrum().fit_transform(X), lambda: gram_pass(U, V), repeats
        ),
        f"o-align / Gram {size}": best_ratio(
            lambda: aligned.transform(X), lambda: gram_pass(U, V), repeats
        ),
        f"projection / bmm {size}": best_ratio(
            lambda: projected.transform(X),
            lambda: (torch.bmm(P, U), torch.bmm(Q, V)),
            repeats,
        ),
    }


def ratios_to_dense(rank: int, n_dense: int) -> dict[str, float]:
    """Give the ratios to what needs the dense updates, at n=768."""
    X, U, V = zoo(768, rank)
    updates = (U @ V.mT).numpy()

    def dense_spectrum() -> None:
        # All would take minutes: some, and the time of ours for as many.
        np.linalg.svd(updates[:n_dense], compute_uv=False)

    def dense_directions() -> None:
        left = updates.transpose(1, 0, 2).reshape(768, -1)
        right = updates.transpose(2, 0, 1).reshape(768, -1)
        for stack in (left, right):
            randomized_svd(stack, N_COMPONENTS, random_state=0)

    hosvd = GLEquivariantProjection(N_COMPONENTS, method="hosvd")
    ratio = best_ratio(lambda: SVDSpectrum().fit_transform(X), dense_spectrum, 2)
    return {
        f"spectrum / dense svd n=768 r={rank}": ratio * n_dense / N_ADAPTERS,
        f"hosvd fit / randomized_svd n=768 r={rank}": best_ratio(
            lambda: hosvd.fit(X), dense_directions, 2
        ),
    }


def ratios_of_one() -> dict[str, float]:
    """Give ratios for one adapter of many small modules, to the kernels module by module."""
    layout = LoRALayout([(f"layers.{i}", 640, 640, 8) for i in range(560)])
    flat = np.random.default_rng(0).standard_normal((2, layout.width), np.float32)
    X = LoRACollection.from_array(flat, layout)
    templates, factors = (
        [
            [torch.from_numpy(row[:, part].reshape(1, 640, 8)) for part in parts]
            for parts in layout.factor_slices
        ]
        for row in (flat[:1], flat[1:])
    )
    spectra, align = SVDSpectrum().fit(X), OAlign(template=0).fit(X)

    def align_one_by_one() -> None:
        for (U, V), (U0, V0) in zip(factors, templates, strict=True):
            Q = procrustes(U, V, U0, V0)
            _ = U @ Q, V @ Q

    label = "by module, 1 x 560 n=640 r=8"
    return {
        f"spectrum / {label}": best_ratio(
            lambda: spectra.transform(X[1:]), lambda: [spectrum(U, V) for U, V in factors], 5
        ),
        f"o-align / {label}": best_ratio(lambda: align.transform(X[1:]), align_one_by_one, 5),
    }


def ratios(quick: bool = False) -> dict[str, float]:
    """Give all ratios; less is better."""
    if quick:
        return {**ratios_at(2048, 4, 20), **ratios_at(1024, 32, 10), **ratios_of_one()}
    found = ratios_of_one()
    for n in (768, 4096, 12288):
        for rank in (4, 32):
            found.update(ratios_at(n, rank, 20))
    for rank in (4, 32):
        found.update(ratios_to_dense(rank, 4))
    return found


if __name__ == "__main__":
    print_ratios(__doc__, ratios)
