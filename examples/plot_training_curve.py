"""
Watch a network train
=====================

A fitted network keeps the losses of every epoch. With early stopping, the default for 200 training
adapters or more, part of the adapters is held out, and the network keeps the weights of the epoch
that did best on these.
"""

import matplotlib.pyplot as plt

from sklora import GLNetRegressor, make_architecture
from sklora.datasets import load_digits_loras
from sklora.inspection import TrainingCurveDisplay

zoo = load_digits_loras()
X, y = zoo.data[:400], zoo.size[:400]

# %%
# A network on the factors
# ------------------------
# The star marks the lowest validation loss.

net = GLNetRegressor(max_epochs=30, random_state=0).fit(X, y)
display = TrainingCurveDisplay.from_estimator(net)
print(f"{net.n_iter_} epochs, the best of which was {display.best_epoch_}")

# %%
# A pipeline, at two learning rates
# ---------------------------------
# A pipeline that ends in a network works, too, and ``ax`` puts curves side by side. At the higher
# rate the validation loss goes up and down, and its best is worse.

figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
for ax, lr in zip(axes, (1e-3, 3e-2), strict=True):
    model = make_architecture("svd", "regression", random_state=0)
    model.set_params(model__lr=lr, model__max_epochs=100).fit(X, y)
    TrainingCurveDisplay.from_estimator(model, ax=ax)
    ax.set(title=f"svd, learning rate {lr}", ylim=(0, 1.5))
