"""Score gl-net with and without singular values in its head, beside svd and dense.

On a zoo that is trained for it, 1,023 adapters of width 32; five folds, the mean and its standard
error. dense is ridge regression with the cosine kernel of the updates. Some 15 minutes on a core
of its own.

    python benchmarks/score_glnet_spectrum.py
"""

import argparse

import numpy as np
from sklearn.base import clone
from sklearn.decomposition import KernelPCA
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline

from sklora import GLNetClassifier, GLNetRegressor, UpdateKernel, make_architecture
from sklora.datasets import make_digits_loras


def models(task):
    """The four, at their defaults."""
    is_regression = task == "regression"
    glnet = GLNetRegressor if is_regression else GLNetClassifier
    ridge = Ridge if is_regression else RidgeClassifier
    return {
        "svd": make_architecture("svd", task, random_state=0),
        "dense": make_pipeline(
            UpdateKernel("cosine"), KernelPCA(kernel="precomputed"), ridge(alpha=0.1)
        ),
        "gl-net": glnet(random_state=0),
        "gl-net, spectrum": glnet(spectrum=True, random_state=0),
    }


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--adapters", type=int, default=1023)
parser.add_argument("--seed", type=int, default=102)
args = parser.parse_args()

zoo = make_digits_loras(args.adapters, dim=32, random_state=args.seed)
splits = [*KFold(5, shuffle=True, random_state=0).split(zoo.size)]
for target in ("presence", "size", "loss"):
    task = "regression" if target == "loss" else "classification"
    score = r2_score if target == "loss" else lambda true, predicted: (predicted == true).mean()
    for name, model in models(task).items():
        scores = []
        for train, test in splits:
            fitted = clone(model).fit(zoo.data[train], zoo[target][train])
            scores.append(score(zoo[target][test], fitted.predict(zoo.data[test])))
        error = np.std(scores, ddof=1) / len(scores) ** 0.5
        print(f"{target:10}{name:18}{np.mean(scores):.3f} ± {error:.3f}", flush=True)
