"""
Adapters of ranks that training never saw
=========================================

A folder of adapters seldom has one rank. Can a model that was trained on some ranks read others?
``svd``, ``dense`` and ``gl-net`` take any rank, because their features belong to the update ``U
V^T`` and not to its factors. ``mlp`` reads the factors and has no place for more columns than it
was trained on.
"""

# %%
# Ranks 1, 2 and 3 from rank 4
# ----------------------------
# The bundled adapters all have rank 4. The other ranks are made from them as tools that *resize*
# adapters do it: every update is replaced by its best approximation of lower rank, from its
# singular value decomposition. ``sklora.linalg.balance`` orders the columns of both factors by
# singular value, so that the first ``rank`` of them are that approximation. So these are real
# adapters, made smaller; adapters *trained* at another rank may differ more.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from sklora import LoRACollection, UpdateKernel, make_architecture
from sklora.datasets import load_digits_loras
from sklora.linalg import balance, frobenius_norm


def resized(X, rank):
    """Give the best approximation of this rank to every update of X."""
    layout = X.layout.with_ranks([rank] * X.layout.n_modules)
    factors = [
        tuple(factor[..., :rank].numpy() for factor in balance(*map(torch.from_numpy, pair)))
        for pair in X.factors()
    ]
    return LoRACollection.from_array(layout.pack(factors), layout, ids=X.ids)


def norm(X):
    """Give the norm of all updates of each adapter, as one vector."""
    norms = [frobenius_norm(*map(torch.from_numpy, pair)) for pair in X.factors()]
    return torch.cat(norms, dim=1).norm(dim=1).numpy()


X, digits = load_digits_loras(return_X_y=True)
zoos = {rank: resized(X, rank) for rank in (1, 2, 3)} | {4: X}
for rank, zoo in zoos.items():
    print(f"rank {rank}: {np.mean(norm(zoo) / norm(X)):.0%} of the norm of rank 4")

# %%
# Train on ranks 2 and 3
# ----------------------
# Half of the training adapters come at rank 2, the others at rank 3, in one collection. The test
# adapters are others, and come at each of the four ranks; at rank 4 they are as the bundled files
# hold them.

train, test = train_test_split(np.arange(len(X)), test_size=0.5, random_state=0)
half = len(train) // 2
mixed = LoRACollection.from_factors([*zoos[2][train[:half]], *zoos[3][train[half:]]])
print(mixed, np.unique(mixed.ranks))

# %%
# The question is which digits an adapter was trained on: ten labels, each of which is true of half
# of the adapters. For ``dense``, ridge regression on the cosine kernel of the updates learns from
# their entries in seconds.

models = {
    "mlp": make_architecture("mlp", random_state=0),
    "svd": make_architecture("svd", random_state=0),
    "dense": make_pipeline(UpdateKernel("cosine"), RidgeClassifier()),
    "gl-net": make_architecture("gl-net", random_state=0),
}
right, refused = {}, {}
for name, model in models.items():
    model.fit(mixed, digits[train])
    for rank, zoo in zoos.items():
        try:
            predicted = model.predict(zoo[test])
        except ValueError as error:
            refused[name, rank] = error
        else:
            right[name, rank] = (predicted == digits[test]).mean(axis=1)

chance = max(digits.mean(), 1 - digits.mean())
print(f"accuracy, mean of ten labels; chance is {chance:.3f}")
print("".join(f"{text:>10}" for text in ["", *(f"rank {rank}" for rank in zoos)]))
for name in models:
    cells = [
        f"{right[name, rank].mean():.3f}" if (name, rank) in right else "refused" for rank in zoos
    ]
    print("".join(f"{text:>10}" for text in [name, *cells]))

# %%
# This is how ``mlp`` refuses rank 4.

print(refused["mlp", 4])

# %%
# Accuracy by rank
# ----------------
# From the ranks of training to rank 4, ``svd``, ``dense`` and ``gl-net`` lose nothing. At rank 1
# the smaller directions of every update are gone: ``dense`` and ``gl-net`` lose a little, and
# ``svd`` the little that it had. There ``mlp`` goes on, with zeros in the columns that are missing.
# It is close to chance at every rank, as it sees factors in a gauge that differs from adapter to
# adapter. The ranks of training are shaded. Bars are two standard errors over the test adapters,
# for this one split.

figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
styles = {
    "dense": ("s", "#E69F00"), "gl-net": ("o", "#0072B2"),
    "svd": ("^", "#009E73"), "mlp": ("X", "#D55E00"),
}  # fmt: skip
axis.axvspan(1.5, 3.5, color="0.93", linewidth=0)
axis.axhline(chance, color="0.3", linewidth=1, linestyle=":")
axis.text(4.3, chance, "chance", va="bottom", ha="right", color="0.3")
for place, (name, (marker, color)) in enumerate(styles.items()):
    answered = [rank for rank in zoos if (name, rank) in right]
    means = [right[name, rank].mean() for rank in answered]
    spread = [2 * right[name, rank].std() / np.sqrt(len(test)) for rank in answered]
    x = np.array(answered) + 0.04 * (place - 1.5)
    axis.errorbar(x, means, spread, fmt=marker + "-", color=color, markersize=7, label=name)
axis.annotate(
    "mlp refuses rank 4", (3.06, right["mlp", 3].mean()), (3.75, 0.57), ha="center",
    arrowprops={"arrowstyle": "<-", "color": "0.3"}, color="0.3",
)  # fmt: skip
axis.set(xticks=list(zoos), xlabel="rank of the test adapters", ylabel="accuracy, ten labels")
axis.set(xlim=(0.7, 4.3), ylim=(0.45, 0.9))
axis.text(2.5, 0.89, "ranks of the training", ha="center", va="top", color="0.3")
axis.legend(frameon=False, ncols=4, loc="lower left")
axis.spines[["top", "right"]].set_visible(False)
plt.show()
