"""
Compare the five architectures
==============================

Which of the paper's architectures reads most from LoRA weights? Each is cross-validated on the
bundled zoo: on which digits an adapter was trained on (classification, ten labels), and on its
denoising loss on held-out images (regression). Every set of digits comes once in this zoo, so that
no fold is tested on a set that it was trained on.

``python examples/plot_compare_architectures.py --help`` names further targets.
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import make_scorer
from sklearn.model_selection import KFold, cross_validate
from tqdm.auto import tqdm

from sklora import ARCHITECTURES, make_architecture
from sklora.datasets import load_digits_loras


def label_accuracy(y_true, y_predicted):
    """Share of right answers, over all labels."""
    return np.mean(y_true == y_predicted)


TARGETS = {
    "presence": ("classification", make_scorer(label_accuracy), "accuracy, mean of 10 labels", 0.5),
    "size": ("classification", "accuracy", "accuracy, 10 classes", None),
    "loss": ("regression", "r2", "R2", None),
    "loss_all": ("regression", "r2", "R2", None),
}

# %%
# Everything that a run may vary.

parser = argparse.ArgumentParser(description="Cross-validate the five architectures.")
parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["presence", "loss"])
parser.add_argument("--folds", type=int, default=3)
parser.add_argument("--jobs", type=int, default=2, help="folds computed at the same time")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", default="comparison.png", help="where the chart is saved")
args = parser.parse_args()

# %%
# Cross-validation. The folds are the same for all architectures.

zoo = load_digits_loras()
folds = KFold(args.folds, shuffle=True, random_state=args.seed)
results = {}
print(zoo.data)
print(f"{'target':10}{'architecture':14}{'score':>8}{'spread':>9}{'fit time':>11}")
runs = [(target, name) for target in args.targets for name in ARCHITECTURES]
for target, name in tqdm(runs, disable=None, leave=False):
    task, scoring, _, _ = TARGETS[target]
    model = make_architecture(name, task, random_state=args.seed)
    result = cross_validate(
        model, zoo.data, zoo[target], scoring=scoring, cv=folds, n_jobs=args.jobs
    )
    scores, seconds = result["test_score"], result["fit_time"].mean()
    results[target, name] = scores
    tqdm.write(
        f"{target:10}{name:14}{scores.mean():8.3f}{'±':>4}{scores.std(ddof=1):.3f}{seconds:9.1f} s"
    )

# %%
# The chart: the bar is the mean over the folds, each dot one fold.

figure, axes = plt.subplots(
    1,
    len(args.targets),
    figsize=(1 + 4 * len(args.targets), 4),
    squeeze=False,
    layout="constrained",
)
for axis, target in zip(axes[0], args.targets, strict=True):
    _, _, label, chance = TARGETS[target]
    scores = np.array([results[target, name] for name in ARCHITECTURES])
    means = scores.mean(axis=1)
    axis.bar(ARCHITECTURES, means, color="0.8", edgecolor="0.3")
    positions = np.repeat(np.arange(len(ARCHITECTURES)), args.folds)
    axis.plot(positions, scores.ravel(), "o", color="tab:blue", markersize=4, alpha=0.8)
    for position, mean in enumerate(means):
        axis.annotate(
            f"{mean:.2f}", (position, max(scores[position].max(), 0)), (0, 4),
            textcoords="offset points", ha="center",
        )  # fmt: skip
    if chance is not None:
        axis.axhline(chance, color="0.3", linewidth=1, linestyle="--")
        axis.text(1.01, chance, "chance", va="center", transform=axis.get_yaxis_transform())
    axis.set(title=target, ylabel=label)
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
figure.suptitle(f"{len(zoo.data)} LoRAs, {args.folds}-fold cross-validation")
figure.savefig(args.output, dpi=150)
print(f"Chart saved to {args.output}")
