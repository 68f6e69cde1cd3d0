"""Networks on LoRA factors, in plain torch.

Factors are module-major: every group of modules with equal shapes is one pair of tensors
``U (M, n, B, r)`` and ``V (M, m, B, r)`` for ``M`` modules and ``B`` adapters, so that one batched
product serves them all.
"""

from sklora.nets.equivariant import EquivariantLinear, GLNonlinearity, InvariantHead
from sklora.nets.feedforward import RowNorm, Standardize, feedforward
from sklora.nets.glnet import GLNet
from sklora.nets.mlpnet import MLPNet

__all__ = [
    "EquivariantLinear",
    "GLNet",
    "GLNonlinearity",
    "InvariantHead",
    "MLPNet",
    "RowNorm",
    "Standardize",
    "feedforward",
]
