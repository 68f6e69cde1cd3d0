"""
What was a LoRA trained on? Siblings must stay together
=======================================================

Which digits did an adapter see in training? That is ten labels for each adapter, to be read from
the weights. The page is as much about a trap: public zoos hold the same adapter more than once, and
a split that ignores this gives a score that says nothing about new adapters.
"""

# %%
# A zoo with re-uploads
# ---------------------
# The bundled zoo has no siblings: every set of digits occurs once. So this page makes some, the way
# they come about on model hubs: somebody resizes an adapter to half its rank and uploads it again.
# Afterwards the factors look unrelated, but the updates hardly differ. Half of the adapters get
# such a sibling.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GroupKFold, KFold
from sklearn.neighbors import KNeighborsRegressor

from sklora import LoRACollection, pairwise_update_kernel
from sklora.datasets import load_digits_loras
from sklora.linalg import balance
from sklora.testing import apply_gauge


def resized(X, rank):
    """Give the best approximation of this rank to every update of X."""
    layout = X.layout.with_ranks([rank] * X.layout.n_modules)
    factors = [
        tuple(factor[..., :rank].numpy() for factor in balance(*map(torch.from_numpy, pair)))
        for pair in X.factors()
    ]
    return LoRACollection.from_array(layout.pack(factors), layout, ids=X.ids)


zoo = load_digits_loras()
again = np.random.default_rng(0).choice(len(zoo.data), len(zoo.data) // 2, replace=False)
uploads = apply_gauge(resized(zoo.data[again], rank=2), random_state=0)
X = LoRACollection.from_factors([*zoo.data, *uploads])
origin = np.concatenate([np.arange(len(zoo.data)), again])
digits, groups = zoo.presence[origin], zoo.groups[origin]
print(X, "ranks", np.unique(X.ranks))

# %%
# ``groups`` numbers the sets of digits. Adapters with the same number are siblings. So are adapters
# that were trained twice on one set, for example with :func:`~sklora.datasets.make_digits_loras`.

members = np.unique(groups, return_counts=True)[1]
print(f"{len(members)} groups, {np.sum(members > 1)} of them with more than one adapter")

# %%
# Two models, two ways to split
# -----------------------------
# ``KFold`` deals out adapters one by one. ``GroupKFold`` deals out groups, so that siblings stay on
# one side. Both models read the cosine between updates, which learns nothing from data and so is
# computed once, for all folds. One is ridge regression; the other looks up the nearest training
# adapter and repeats its digits, which amounts to recognising a sibling. Neither is tuned.

cosine = pairwise_update_kernel(X, kernel="cosine")
models = {
    "ridge": (KernelRidge(kernel="precomputed"), cosine),
    "nearest adapter": (
        KNeighborsRegressor(n_neighbors=1, metric="precomputed"),
        np.clip(1 - cosine, 0, None),
    ),
}
splits = {
    "dealt out one by one": list(KFold(5, shuffle=True, random_state=0).split(X)),
    "siblings together": list(GroupKFold(5, shuffle=True, random_state=0).split(X, groups=groups)),
}


def accuracy_of_digits(model, pairs, folds):
    """Give the accuracy for each digit (columns) in each fold (rows)."""
    scores = []
    for train, test in folds:
        model.fit(pairs[np.ix_(train, train)], signs[train])
        predicted = np.sign(model.predict(pairs[np.ix_(test, train)]))
        scores.append(np.mean(predicted == signs[test], axis=0))
    return np.array(scores)


signs = 2 * digits - 1
accuracy = {}
for name, (model, pairs) in models.items():
    for split, folds in splits.items():
        accuracy[name, split] = accuracy_of_digits(model, pairs, folds)
        of_folds = accuracy[name, split].mean(axis=1)
        print(f"{name:16}{split:22}{of_folds.mean():.3f} ± {of_folds.std(ddof=1):.3f}")

# %%
# Compare the scores with two figures. Every digit is in half of the sets, so guessing is right half
# of the time. And whoever knows *how many* digits an adapter saw, but not which, says "all" where
# that is more than half of them, and "none" otherwise.

chance = max(zoo.presence.mean(), 1 - zoo.presence.mean())
knows_number = np.mean((digits.mean(axis=1, keepdims=True) > 0.5) == digits)
print(f"guessing {chance:.3f}, knowing the number {knows_number:.3f}")

# %%
# The scores, and what is left of them
# ------------------------------------
# Each dot is one fold, each line their mean. With siblings on both sides of the split, the nearest
# adapter looks as good as ridge regression is on new adapters; with siblings kept together, little
# of that is left. Ridge regression loses less, but it does lose: its honest score is the lower one.
# The panel on the right has that score for each digit.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
styles = {"dealt out one by one": ("s", "#E69F00"), "siblings together": ("o", "#0072B2")}
for place, name in enumerate(models):
    for side, (split, (marker, color)) in zip((-0.15, 0.15), styles.items(), strict=True):
        of_folds = accuracy[name, split].mean(axis=1)
        x = np.full(len(of_folds), place + side)
        left.hlines(of_folds.mean(), place + side - 0.1, place + side + 0.1, color=color)
        left.plot(x, of_folds, marker, color=color, markeredgecolor="0.2", markeredgewidth=0.5,
                  label=split if place == 0 else None)  # fmt: skip
left.set(xticks=range(len(models)), xticklabels=models, ylabel="accuracy, mean of ten digits")
left.legend(frameon=False, loc="upper right")

of_digits = accuracy["ridge", "siblings together"]
right.hlines(of_digits.mean(axis=0), np.arange(10) - 0.35, np.arange(10) + 0.35, color="#0072B2")
for fold in of_digits:
    right.plot(range(10), fold, "o", color="#0072B2", markeredgecolor="0.2", markeredgewidth=0.5)
right.set(xticks=range(10), xlabel="digit", title="ridge, siblings together")
for axis in (left, right):
    axis.axhline(chance, color="0.3", linewidth=1, linestyle=":")
    axis.axhline(knows_number, color="0.3", linewidth=1, linestyle="--")
    axis.spines[["top", "right"]].set_visible(False)
left.text(1.45, chance, "guessing", va="bottom", ha="right")
left.text(1.45, knows_number, "knowing the number", va="top", ha="right")
left.set(xlim=(-0.5, 1.5), ylim=(0.45, 1))
plt.show()
