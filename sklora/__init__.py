"""Learn from LoRA weights with scikit-learn."""

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
