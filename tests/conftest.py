"""Fixtures that tests of every part share."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import settings

from sklora.collection import LoRACollection

SHAPES = ((6, 4), (5, 4), (6, 4))

RandomLoras = Callable[..., LoRACollection]

# The first call of a kernel takes a second on a busy machine, and time is no property.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    # A worker of joblib that starts to use a GPU grows by more than joblib takes for a leak, and is
    # replaced, with a warning that as an error would end the thread that replaces it.
    if torch.cuda.is_available():
        config.addinivalue_line("filterwarnings", "ignore:A worker stopped:UserWarning")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def random_loras() -> RandomLoras:
    """Adapters with normal factors: a function of the generator, number, shapes, rank and dtype.

    `rank` is one number for all updates, or one for every adapter and module, where 0 leaves the
    module out. Modules are named m0, m1, ...
    """

    def make(
        rng: np.random.Generator,
        n_adapters: int = 8,
        shapes: Sequence[tuple[int, int]] = SHAPES,
        rank: int | Sequence[Sequence[int]] = 2,
        dtype: type = np.float64,
        **options: object,
    ) -> LoRACollection:
        ranks = np.broadcast_to(np.asarray(rank), (n_adapters, len(shapes)))
        factors = [
            {
                f"m{position}": (rng.normal(size=(n, r)), rng.normal(size=(m, r)))
                for position, ((n, m), r) in enumerate(zip(shapes, row, strict=True))
                if r
            }
            for row in ranks
        ]
        return LoRACollection.from_factors(factors, dtype=dtype, **options)

    return make


@pytest.fixture
def cuda() -> str:
    """The device of tests marked gpu."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"
