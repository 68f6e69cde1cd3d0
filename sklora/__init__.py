"""Learn from LoRA weights with scikit-learn."""

from importlib import import_module
from typing import TYPE_CHECKING

import sklora._process  # noqa: F401 (silent logging, and forks that can compute)
from sklora._pipelines import TRUSTED_TYPES
from sklora.architectures import ARCHITECTURES, architecture_grid, make_architecture
from sklora.collection import LoRACollection, LoRALayout
from sklora.estimators import (
    GLNetClassifier,
    GLNetRegressor,
    MLPNetClassifier,
    MLPNetRegressor,
)
from sklora.transform import (
    DenseProduct,
    GLEquivariantProjection,
    OAlign,
    SVDSpectrum,
    UpdateKernel,
    pairwise_update_kernel,
)

__version__ = "0.1.0"

__all__ = [
    "ARCHITECTURES",
    "DenseProduct",
    "GLEquivariantProjection",
    "GLNetClassifier",
    "GLNetRegressor",
    "LoRACollection",
    "LoRALayout",
    "MLPNetClassifier",
    "MLPNetRegressor",
    "OAlign",
    "SVDSpectrum",
    "TRUSTED_TYPES",
    "UpdateKernel",
    "architecture_grid",
    "make_architecture",
    "pairwise_update_kernel",
]

_SUBMODULES = (
    "datasets",
    "deployment",
    "estimators",
    "inspection",
    "io",
    "linalg",
    "nets",
    "testing",
    "transform",
)

if not TYPE_CHECKING:  # a checker would take any name for one of the package

    def __getattr__(name):  # as those of scikit-learn, submodules are imported when they are named
        if name in _SUBMODULES:
            return import_module(f"sklora.{name}")
        raise AttributeError(f"module 'sklora' has no attribute {name!r}")

    def __dir__():
        return sorted([*__all__, *_SUBMODULES, "__version__"])
