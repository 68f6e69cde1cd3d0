"""Featurizers: from the weights of adapters to canonical weights, or to features.

:class:`OAlign` and :class:`GLEquivariantProjection` map weights to weights: a collection in gives
a collection out. :class:`SVDSpectrum` and :class:`DenseProduct` map weights to features: an array
with one column per feature. :class:`UpdateKernel` compares new adapters with those of the training.
The mathematics is in :mod:`sklora.linalg`.
"""

from sklora.transform.align import OAlign
from sklora.transform.dense import DenseProduct
from sklora.transform.kernel import UpdateKernel, pairwise_update_kernel
from sklora.transform.projection import GLEquivariantProjection
from sklora.transform.spectrum import SVDSpectrum

__all__ = [
    "DenseProduct",
    "GLEquivariantProjection",
    "OAlign",
    "SVDSpectrum",
    "UpdateKernel",
    "pairwise_update_kernel",
]
