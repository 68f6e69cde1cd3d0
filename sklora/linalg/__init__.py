"""Pure functions on batched LoRA factors.

Everything here takes torch tensors ``U (..., n, r)`` and ``V (..., m, r)``, the factors of the
update ``U V^T (..., n, m)``, with any number of leading batch dimensions, on any device. float32
and float64 come out as they went in; float16 and bfloat16 come out as float32. Decompositions run
in float64 whatever the input, because a badly conditioned gauge costs digits that float32 does not
have.

Nothing here knows about scikit-learn, layouts or true ranks: zero-padded columns are columns.
"""

from sklora.linalg.align import procrustes
from sklora.linalg.gauge import apply_gauge, balance
from sklora.linalg.products import (
    column_sums,
    dense_product,
    frobenius_norm,
    inner_product,
    pairwise_inner_products,
    row_sums,
    squared_norm,
)
from sklora.linalg.spectrum import spectrum
from sklora.linalg.subspaces import (
    CompressedUpdates,
    compress_updates,
    leading_directions,
    leading_subspaces,
)

__all__ = [
    "CompressedUpdates",
    "apply_gauge",
    "balance",
    "column_sums",
    "compress_updates",
    "dense_product",
    "frobenius_norm",
    "inner_product",
    "leading_directions",
    "leading_subspaces",
    "pairwise_inner_products",
    "procrustes",
    "row_sums",
    "spectrum",
    "squared_norm",
]
