"""
Flag adapters, with a bounded rate of false alarms
==================================================

The task is to read the weights of every upload, and to flag those that were trained on something
forbidden. People check what is flagged, so false alarms have to stay few. This page sets a
threshold that keeps them below a chosen rate, tests it, and shows what it misses: what nobody hid,
and what somebody did.

Here the digit 4 is forbidden. For your own question, train on adapters of your base model for which
you know the answer. :doc:`/results` shows how well backdoors of a small language model are found.
"""

# %%
# Three parts
# -----------
# One part trains the model, one sets the threshold, and one is looked at once, at the end. No set
# of digits occurs twice in the bundled zoo; where there are siblings, keep them in one part, as
# ``GroupShuffleSplit`` does.

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import binomtest
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import FixedThresholdClassifier, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC

from sklora import LoRACollection, UpdateKernel
from sklora.datasets import load_digits_loras
from sklora.testing import apply_gauge

zoo = load_digits_loras()
X, y = zoo.data, zoo.presence[:, 4]
rest, test = train_test_split(np.arange(len(X)), test_size=1 / 4, random_state=0, stratify=y)
train, hold = train_test_split(rest, test_size=1 / 3, random_state=0, stratify=y[rest])

# %%
# A model
# -------
# A support vector machine on the cosines between updates. It keeps its training adapters; to give
# the model away, use ``make_architecture("dense")``, say.

model = make_pipeline(UpdateKernel("cosine"), SVC(kernel="precomputed")).fit(X[train], y[train])

# %%
# A threshold
# -----------
# Take the scores of ``n`` harmless adapters that the model has not seen, and let the ``k``-th
# highest be the threshold. The next harmless adapter, if it is like these, scores above it with
# probability ``k / (n + 1)``, whatever the model is. Scores of training adapters would not do: the
# model has learnt to score the harmless ones low. The model with its threshold is a classifier of
# its own.

allowed = 0.05
harmless = np.sort(model.decision_function(X[hold[y[hold] == 0]]))[::-1]
k = int(allowed * (len(harmless) + 1))
threshold = harmless[k - 1]
flag = FixedThresholdClassifier(
    FrozenEstimator(model), threshold=threshold, response_method="decision_function"
).fit(X[hold], y[hold])
print(f"threshold {threshold:.3f}, the score of number {k} of {len(harmless)} harmless adapters")

# %%
# The test
# --------
# Rates come with an interval of 95 %, since a few hundred adapters do not tell more. Half of this
# zoo is forbidden, but few adapters of any hub are. So the last lines say what share of the flagged
# adapters is forbidden where fewer of all are.


def rate(flagged):
    """Give a share, and an interval of 95 % for it."""
    found = binomtest(int(flagged.sum()), len(flagged))
    return found.statistic, *found.proportion_ci(method="exact")


good, bad = X[test[y[test] == 0]], X[test[y[test] == 1]]
false_alarms, found = rate(flag.predict(good)), rate(flag.predict(bad))
for name, (share, low, high) in {"false alarms": false_alarms, "found": found}.items():
    print(f"{name:13} {share:.3f} ({low:.3f} to {high:.3f})")
for forbidden in (0.5, 0.1, 0.01):
    right, wrong = forbidden * found[0], (1 - forbidden) * false_alarms[0]
    print(f"where {forbidden:4.0%} are forbidden, {right / (right + wrong):.0%} of the flagged are")

# %%
# Somebody hides it
# -----------------
# The owner of a forbidden adapter may change its files. Other factors of the same updates do not
# help, and neither does a smaller alpha, as cosines have no scale. Noise of the size of the updates
# hardly does. But half of a forbidden adapter plus half of a harmless one still makes an adapter
# that saw the digit, and most of these pass. So an adapter that is not flagged is not thereby
# harmless: :doc:`/security` says what a score does not prove.


def with_others(adapters, others):
    """Add the updates of other adapters, in the concatenated factors."""
    return LoRACollection.from_factors(
        {name: tuple(map(np.hstack, zip(one[name], other[name], strict=True))) for name in one}
        for one, other in zip(adapters, others, strict=True)
    )


def scaled(adapters, scale):
    """Multiply the updates of every adapter."""
    return LoRACollection.from_factors(
        {name: (scale * U, V) for name, (U, V) in one.items()} for one in adapters
    )


def noise_like(adapters, rng):
    """Give updates of random directions, each with the norm of that in its place."""
    for one in adapters:
        drawn = {}
        for name, (U, V) in one.items():
            A, B = rng.normal(size=U.shape), rng.normal(size=V.shape)
            drawn[name] = A * (np.linalg.norm(U @ V.T) / np.linalg.norm(A @ B.T)), B
        yield drawn


noise = LoRACollection.from_factors(noise_like(bad, np.random.default_rng(0)))
hidden = {
    "as they are": bad,
    "other factors": apply_gauge(bad, condition=1e3, random_state=0),
    "half the alpha": scaled(bad, 0.5),
    "noise added": with_others(bad, noise),
    "merged half and half": with_others(scaled(bad, 0.5), scaled(good, 0.5)),
}
rates = {name: rate(flag.predict(adapters)) for name, adapters in hidden.items()}
for name, (share, low, high) in rates.items():
    print(f"{name:21} {share:.3f} ({low:.3f} to {high:.3f})")

# %%
# On the left are the scores of the adapters of the test part; those right of the dashed line are
# flagged. On the right is the share of the forbidden ones that is flagged, with the intervals.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
scores = [model.decision_function(part) for part in (good, bad)]
bins = np.histogram_bin_edges(np.concatenate(scores), 30)
style = {"color": "#56B4E9", "edgecolor": "0.2", "linewidth": 0.4}
left.hist(scores[0], bins, label="harmless", **style)
left.hist(scores[1], bins, label="forbidden", histtype="step", color="#D55E00", linewidth=1.8)
left.axvline(threshold, color="0.3", linestyle="--", linewidth=1)
left.set(xlabel="score", ylabel="adapters")
left.yaxis.get_major_locator().set_params(integer=True)
left.legend(frameon=False)

shares, lows, highs = map(np.array, zip(*rates.values(), strict=True))
right.barh(list(rates), shares, xerr=[shares - lows, highs - shares], ecolor="0.3", **style)
right.invert_yaxis()
right.set(xlabel="share of the forbidden adapters that is flagged", xlim=(0, 1))
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
plt.show()
