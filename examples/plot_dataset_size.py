"""
How many images was a LoRA trained on?
======================================

Salama et al., *Dataset Size Recovery from LoRA Weights*
(`arXiv 2406.19395 <https://arxiv.org/abs/2406.19395>`_), read the number of training images off the
singular values of the updates, with nearest neighbours. This page tries the same on the bundled
zoo, whose adapters were trained on 1 to 10 images: one of each digit in a set of digits. So "how
many images" and "how many kinds of digit" are one question here, which they were not in the paper.

Needs pandas: ``pip install -c constraints.txt pandas`` in a clone of the repository.
"""

# %%
# Spectra as a data frame
# -----------------------
# ``SVDSpectrum`` learns only the layout of the adapters that it is fitted on. So calling it once
# for all adapters leaks nothing into the test folds below.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import VotingClassifier
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict, cross_validate
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

from sklora import MLPNetClassifier, SVDSpectrum
from sklora.datasets import load_digits_loras

zoo = load_digits_loras()
size = zoo.size
spectra = SVDSpectrum().set_output(transform="pandas").fit_transform(zoo.data)
spectra.iloc[:3, :5].round(3)

# %%
# Sizes are distributed unevenly: there are 252 sets of five digits, but only one of all ten.

counts = {int(n): int(count) for n, count in zip(*np.unique(size, return_counts=True), strict=True)}
print(counts)

# %%
# Models
# ------
# The paper asks one nearest neighbour in each module, and lets the modules vote. The page compares
# this with neighbours in the spectra of all modules at once, one or as many as a search inside the
# training folds picks, and with the perceptron of the ``svd`` architecture. All of them have to
# beat a model that always says the most frequent size.


def neighbour_in(module):
    """Give a nearest neighbour that sees the columns of one module."""
    columns = make_column_transformer(("passthrough", make_column_selector(f"^{module}:")))
    return make_pipeline(columns, KNeighborsClassifier(n_neighbors=1))


modules = zoo.data.layout.names
vote = VotingClassifier([(name.replace(".", "_"), neighbour_in(name)) for name in modules])
more_neighbours = GridSearchCV(KNeighborsClassifier(), {"n_neighbors": [3, 10, 30]}, cv=KFold(3))
models = {
    "most frequent size": DummyClassifier(),
    "vote of modules": vote,
    "1 neighbour": KNeighborsClassifier(n_neighbors=1),
    "3 to 30 neighbours": more_neighbours,
    "perceptron (svd)": MLPNetClassifier(random_state=0),
}

# %%
# Scores
# ------
# Every set of digits occurs once in this zoo, so no adapter has a sibling in another fold. The
# error is in images, so a near miss costs less than a far one.

folds = KFold(5, shuffle=True, random_state=0)
scoring = {"accuracy": "accuracy", "error": "neg_mean_absolute_error"}
accuracy = {}
print(f"{'model':20}{'accuracy':>16}{'mean error in images':>24}")
for name, model in models.items():
    X = spectra.to_numpy() if "perceptron" in name else spectra
    scores = cross_validate(model, X, size, cv=folds, scoring=scoring)
    accuracy[name], error = scores["test_accuracy"], -scores["test_error"]
    print(
        f"{name:20}{accuracy[name].mean():8.3f} ± {accuracy[name].std(ddof=1):.3f}"
        f"{error.mean():16.3f} ± {error.std(ddof=1):.3f}"
    )

# %%
# Where the neighbours err
# ------------------------
# Errors are mostly by one image. Of the adapters of sizes that occur ten times or fewer, most are
# missed. Left, each dot is one fold. Right, the predictions of the neighbours, each for an adapter
# that they had not seen: rows add up to one, and the diagonal is what is right.

predicted = cross_val_predict(more_neighbours, spectra, size, cv=folds)
shares = confusion_matrix(size, predicted, normalize="true")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
for row, scores in enumerate(accuracy.values()):
    left.barh(row, scores.mean(), color="0.85", edgecolor="0.4")
    left.plot(scores, np.full(len(scores), row), "o", color="#0072B2", markersize=5, alpha=0.8)
left.axvline(accuracy["most frequent size"].mean(), color="0.3", linestyle="--", linewidth=1)
left.set(
    yticks=range(len(accuracy)),
    yticklabels=accuracy,
    xlabel="accuracy of ten sizes",
    xlim=(0, 0.65),
)
left.invert_yaxis()
left.spines[["top", "right"]].set_visible(False)

sizes = np.unique(size)
image = right.imshow(shares, cmap="Blues", vmin=0, vmax=1)
right.plot([-0.5, 9.5], [-0.5, 9.5], color="0.3", linewidth=0.8, linestyle="--")
right.set(
    xticks=range(len(sizes)), yticks=range(len(sizes)), xticklabels=sizes, yticklabels=sizes,
    xlabel="predicted number of images", ylabel="true number of images",
    title="3 to 30 neighbours",
)  # fmt: skip
figure.colorbar(image, ax=right, label="share of the row")
plt.show()
