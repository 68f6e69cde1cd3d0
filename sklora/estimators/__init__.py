"""scikit-learn estimators that train a network of :mod:`sklora.nets` on LoRA weights."""

from sklora.estimators._training import TrainingInterruptedWarning
from sklora.estimators.glnet import GLNetClassifier, GLNetRegressor
from sklora.estimators.mlpnet import MLPNetClassifier, MLPNetRegressor

__all__ = [
    "GLNetClassifier",
    "GLNetRegressor",
    "MLPNetClassifier",
    "MLPNetRegressor",
    "TrainingInterruptedWarning",
]
