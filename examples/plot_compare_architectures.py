"""
Compare the five architectures
==============================

Which of the paper's architectures reads most from LoRA weights? This page cross-validates each on
the bundled zoo, for two targets: on which digits an adapter was trained (classification, ten
labels), and its denoising loss on held-out images (regression). Every set of digits occurs once in
this zoo, so no fold is tested on a set that it was trained on.

``python examples/plot_compare_architectures.py --help`` names further targets.
"""

import argparse

import numpy as np
from sklearn.metrics import make_scorer
from sklearn.model_selection import KFold, cross_validate
from tqdm.auto import tqdm

from sklora import ARCHITECTURES, make_architecture
from sklora.datasets import load_digits_loras
from sklora.inspection import ArchitectureComparisonDisplay


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
# These options vary a run.

parser = argparse.ArgumentParser(description="Cross-validate the five architectures.")
parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["presence", "loss"])
parser.add_argument("--folds", type=int, default=2)
parser.add_argument("--jobs", type=int, default=2, help="folds computed at the same time")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", default="comparison.png", help="where the chart is saved")
args = parser.parse_args()

# %%
# Cross-validation, with the same folds for all architectures.

zoo = load_digits_loras()
folds = KFold(args.folds, shuffle=True, random_state=args.seed)
results = {target: {} for target in args.targets}
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
    results[target][name] = result
    tqdm.write(
        f"{target:10}{name:14}{scores.mean():8.3f}{'±':>4}{scores.std(ddof=1):.3f}{seconds:9.1f} s"
    )

# %%
# In the chart, a diamond is the mean over the folds with the standard deviation, and a ring is one
# fold.

display = ArchitectureComparisonDisplay.from_cv_results(
    results,
    score_name={target: TARGETS[target][2] for target in args.targets},
    baseline={target: TARGETS[target][3] for target in args.targets if TARGETS[target][3]},
)
display.figure_.suptitle(f"{len(zoo.data)} LoRAs, {args.folds}-fold cross-validation")
display.figure_.savefig(args.output, dpi=150)
print(f"Chart saved to {args.output}")
