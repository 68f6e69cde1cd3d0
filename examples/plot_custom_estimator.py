"""
A feature of your own, checked for its gauge
============================================

``(U R, V R^-T)`` is the same update as ``(U, V)`` for every invertible ``R``, the *gauge*. A
feature that depends on ``R`` describes how an adapter is stored and not what it does. This page
writes two scikit-learn transformers: one is invariant to the gauge, and one only seems to be.
``sklora.testing`` tells them apart, and predictions show what the difference does.
"""

# %%
# An invariant feature
# --------------------
# Three numbers for each module, all functions of its singular values ``s``: the logarithm of the
# norm, the stable rank ``sum(s^2) / max(s)^2``, and the entropy of ``s^2 / sum(s^2)``.
#
# ``check_loras`` takes collections and plain arrays alike. It checks the numbers and sets
# ``layout_`` and ``n_features_in_``; in ``transform``, it compares the input with what ``fit`` saw.
# ``iter_blocks`` reads as many adapters at a time as fit into scikit-learn's ``working_memory``.
# ``layout.unpack`` stacks the factors of all modules of one shape, so that one call to
# ``sklora.linalg`` serves them all.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted

from sklora import SVDSpectrum
from sklora.collection import check_loras
from sklora.datasets import load_digits_loras
from sklora.linalg import spectrum
from sklora.testing import apply_gauge, assert_gauge_invariant


class ModuleFeatures(TransformerMixin, BaseEstimator):
    """What both transformers share; a subclass computes features from stacked factors."""

    def __init__(self, layout=None):
        self.layout = layout

    def fit(self, X, y=None):
        check_loras(self, X, reset=True)
        return self

    def transform(self, X):
        check_is_fitted(self)
        loras = check_loras(self, X, reset=False)
        blocks = []
        for _, flat in loras.iter_blocks():
            stacks = [map(torch.from_numpy, pair) for pair in loras.layout.unpack(flat)]
            blocks.append(np.concatenate([self._features(U, V) for U, V in stacks], axis=1))
        return np.concatenate(blocks)


class SpectrumShape(ModuleFeatures):
    """Log norm, stable rank and entropy of every update."""

    def _features(self, U, V):
        squares = spectrum(U.double(), V.double()).square()
        total = squares.sum(-1).clamp(min=1e-30)
        stable_rank = total / squares.amax(-1).clamp(min=1e-30)
        entropy = torch.special.entr(squares / total[..., None]).sum(-1)
        return torch.stack([total.log(), stable_rank, entropy], -1).flatten(1).numpy()


# %%
# A feature that only looks invariant
# -----------------------------------
# A rotation ``R`` leaves the lengths of both factors unchanged. But ``R`` need not be a rotation.


class FactorLengths(ModuleFeatures):
    """Log norm of ``U`` and of ``V`` of every module."""

    def _features(self, U, V):
        norms = [torch.linalg.matrix_norm(factor.double()) for factor in (U, V)]
        return torch.stack(norms, -1).clamp(min=1e-30).log().flatten(1).numpy()


# %%
# The check
# ---------
# ``assert_gauge_invariant`` gives every module of every adapter a random gauge of its own and
# compares the output. It is made for tests, and raises ``AssertionError``.

zoo = load_digits_loras()
for features in (SpectrumShape(), FactorLengths()):
    for group in ("O", "GL"):
        try:
            assert_gauge_invariant(features, zoo.data[:200], group=group, random_state=0)
        except AssertionError as error:
            print(f"{error}")
        else:
            print(f"{type(features).__name__}.transform is invariant to {group}(r)")

# %%
# Both pass scikit-learn's own checks, which know nothing of gauges.

for features in (SpectrumShape(), FactorLengths()):
    check_estimator(features, on_skip=None)

# %%
# A cross-validated score does not tell
# -------------------------------------
# All adapters of this zoo were trained alike from similar starting points, and are stored as
# training left them. So the lengths of factors mean something here, and a score within the zoo
# gives no warning. The target is the denoising loss on held-out images, and a constant prediction
# scores an R2 of 0 at best.

models = {
    "FactorLengths": make_pipeline(FactorLengths(), StandardScaler(), RidgeCV()),
    "SpectrumShape": make_pipeline(SpectrumShape(), StandardScaler(), RidgeCV()),
    "SVDSpectrum": make_pipeline(SVDSpectrum(), StandardScaler(), RidgeCV()),
}
folds = KFold(5, shuffle=True, random_state=0)
for name, model in models.items():
    scores = cross_val_score(model, zoo.data, zoo.loss, cv=folds)
    print(f"{name:14} R2 {scores.mean():.3f} ± {scores.std(ddof=1):.3f}")

# %%
# Disguised adapters do
# ---------------------
# Now the test adapters come from someone else's files: the same updates, in gauges of growing
# condition. Tools that merge, resize or balance adapters leave such files behind. The error is in
# units of the spread of the losses, which is the error of the best constant prediction.

train, test = train_test_split(np.arange(len(zoo.data)), test_size=0.3, random_state=0)
conditions = np.array([1, 2, 5, 10, 100, 1000])
seeds = range(5)
errors = {name: np.empty((len(conditions), len(seeds))) for name in models}
for model in models.values():
    model.fit(zoo.data[train], zoo.loss[train])
for row, condition in enumerate(conditions):
    for seed in seeds:
        disguised = apply_gauge(zoo.data[test], condition=condition, random_state=seed)
        for name, model in models.items():
            r2 = model.score(disguised, zoo.loss[test])
            errors[name][row, seed] = np.sqrt(1 - r2)
for name, error in errors.items():
    print(f"{name:14} relative error from {error.min():.3f} to {error.max():.3f}")

# %%
# At condition 1 the gauge is a rotation, which changes no length. At condition 2 the predictions
# from lengths are already worse than a constant. The invariant features do not notice. Marks are
# means over five draws of the gauges, and bars show what the draws span.

figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
styles = {
    "FactorLengths": ("s-", "#D55E00"),
    "SpectrumShape": ("o-", "#0072B2"),
    "SVDSpectrum": ("^--", "#009E73"),
}
for name, (style, color) in styles.items():
    mean = errors[name].mean(axis=1)
    span = np.abs([errors[name].min(axis=1), errors[name].max(axis=1)] - mean)
    axis.errorbar(conditions, mean, span, fmt=style, color=color, capsize=3, label=name)
axis.axhline(1, color="0.3", linewidth=1, linestyle=":")
axis.text(1000, 1.05, "a constant prediction", ha="right", va="bottom", color="0.3")
axis.set(
    xscale="log", yscale="log", xlabel="condition of the gauges of the test adapters",
    ylabel="error / spread of the losses",
)  # fmt: skip
axis.xaxis.set_major_formatter("{x:g}")
axis.yaxis.set_major_formatter("{x:g}")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
plt.show()
