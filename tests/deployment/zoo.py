"""A small zoo for what is deployed, and targets of every kind."""

from __future__ import annotations

import numpy as np

from sklora import LoRACollection, LoRALayout

SHAPES = ((6, 4), (5, 3), (6, 4), (1, 4), (5, 1))


def make_zoo(ranks, side=False, seed=0) -> LoRACollection:
    """Adapters of these ranks (N, n_modules), where 0 leaves a module out."""
    rng = np.random.default_rng(seed)
    names = [f"block.{place}.to_q" for place in range(len(SHAPES))]
    factors = [
        {
            name: (rng.normal(size=(n, r)), rng.normal(size=(m, r)))
            for name, (n, m), r in zip(names, SHAPES, row, strict=True)
            if r
        }
        for row in ranks
    ]
    layout = LoRALayout(
        [(name, n, m, int(np.max(ranks))) for name, (n, m) in zip(names, SHAPES, strict=True)],
        side=[("magnitude", 3)] if side else [],
        base_model="tiny",
    )
    extra = {"side": [{"magnitude": rng.normal(size=3)} for _ in factors]} if side else {}
    return LoRACollection.from_factors(factors, layout=layout, **extra)


def targets(kind, n):
    numbers = np.random.default_rng(1).normal(size=(n, 3))
    return {
        "binary": np.where(np.arange(n) % 2, "no", "yes"),
        "multiclass": np.arange(n) % 3,
        "multilabel": (numbers > 0).astype(int),
        "one number": 3 + numbers[:, 0],
        "two numbers": numbers[:, :2] * [1, 1000] + [0, 500],
    }[kind]
