"""Small zoos, targets that their updates determine, and nets that fit them in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sklora.collection import LoRACollection, LoRALayout
from sklora.estimators import GLNetClassifier, GLNetRegressor, MLPNetClassifier, MLPNetRegressor


@pytest.fixture
def zoo() -> LoRACollection:
    layout = LoRALayout([("q", 6, 4, 2), ("k", 5, 5, 2), ("v", 6, 4, 2)])
    flat = np.random.default_rng(0).normal(size=(60, layout.width))
    return LoRACollection.from_array(flat, layout)


@pytest.fixture
def traces(zoo: LoRACollection) -> NDArray[np.float64]:
    """The trace of the square module's update: linear in it, and the same in every gauge."""
    return np.array([np.einsum("ir,ir->", *adapter["k"]) for adapter in zoo])


@pytest.fixture
def targets(traces: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    order = np.argsort(np.argsort(traces))
    return {
        "binary": np.where(traces > 0, "yes", "no"),
        "multiclass": np.array(["low", "mid", "top"])[order * 3 // len(order)],
        "multilabel": np.column_stack([traces > 0, traces > 1, traces < 0]).astype(int),
        "single": traces,
        "many": np.column_stack([traces, 100 * traces + 5]),
    }


@pytest.fixture
def quick() -> Callable[..., Any]:
    # All that decides how fast a network learns, so that the tests do not hang on the defaults.
    small = {
        "hidden_dim": 4,
        "n_layers": 2,
        "dropout": 0.0,
        "lr": 1e-3,
        "weight_decay": 1e-2,
        "max_epochs": 3,
        "batch_size": 64,
        "early_stopping": True,
        "patience": 15,
        "random_state": 0,
        "device": "cpu",
    }

    def make(estimator: type, **parameters: Any) -> Any:
        return estimator(**small | parameters)

    return make


@pytest.fixture(params=[GLNetClassifier, MLPNetClassifier])
def classifier(request: pytest.FixtureRequest) -> type:
    return request.param


@pytest.fixture(params=[GLNetRegressor, MLPNetRegressor])
def regressor(request: pytest.FixtureRequest) -> type:
    return request.param


@pytest.fixture(
    params=[
        (GLNetClassifier, "binary"),
        (GLNetClassifier, "multilabel"),
        (GLNetRegressor, "many"),
        (MLPNetClassifier, "multiclass"),
        (MLPNetRegressor, "single"),
    ],
    ids=lambda param: f"{param[0].__name__}-{param[1]}",
)
def case(
    request: pytest.FixtureRequest, targets: dict[str, NDArray[Any]]
) -> tuple[type, NDArray[Any]]:
    """An estimator class and a target for it."""
    estimator, kind = request.param
    return estimator, targets[kind]


@pytest.fixture
def same_state() -> Callable[[Any, Any], bool]:
    def compare(one: Any, other: Any) -> bool:
        return one.weights_.keys() == other.weights_.keys() and all(
            np.array_equal(weight, other.weights_[name]) for name, weight in one.weights_.items()
        )

    return compare
