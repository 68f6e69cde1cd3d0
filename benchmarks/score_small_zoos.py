"""Score networks on few adapters, with early stopping and with all of them trained on.

On two zoos that are trained for it, 500 adapters of a diffusion transformer with many recipes and
500 of a language model. Each line is a mean over eight draws of training adapters, scored on 250
others: the score with early stopping, without, and the gain with its standard error. For the kernel
route of `architecture_grid`, its only score. Identities of the first zoo stand on both sides. Some
40 minutes on two cores, half of it for the zoos.

    python benchmarks/score_small_zoos.py
"""

import argparse

import numpy as np
from sklearn.metrics import make_scorer, r2_score
from sklearn.model_selection import GridSearchCV

import sklora.estimators
from sklora import architecture_grid, make_architecture
from sklora.datasets import make_code_loras, make_varied_digits_loras

TARGETS = {
    "varied": {"attributes": "classification", "score": "regression"},
    "code": {"sources": "classification", "loss": "regression"},
}
N_ADAPTERS, N_TESTED = 500, 250


def candidates(task, seed):
    """Give every model by name: networks with early stopping and without, and the kernel route."""
    models = {"o-align": [], "svd": [], "dense": [], "gl-net": []}
    for name, both in models.items():
        for early_stopping in (True, False):
            network = make_architecture(name, task, random_state=seed)
            both.append(network.set_params(model__early_stopping=early_stopping))
    # By default all labels of an adapter have to be right, which of few adapters none are.
    right = make_scorer(lambda y, predicted: (y == predicted).mean())
    search = GridSearchCV(
        make_architecture("svd", task),
        architecture_grid(task)[-1],
        scoring=right if task == "classification" else None,
        cv=5,
    )
    return models | {"kernel": [search]}


def score(model, zoo, target, n_adapters, seed):
    """Train on some adapters, and give the accuracy or R2 on others."""
    rows, y = np.random.RandomState(seed).permutation(len(zoo.data)), zoo[target]
    train, test = rows[:n_adapters], rows[-N_TESTED:]
    predicted = model.fit(zoo.data[train], y[train]).predict(zoo.data[test])
    return r2_score(y[test], predicted) if y.dtype.kind == "f" else (predicted == y[test]).mean()


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--adapters", type=int, nargs="+", default=[30, 60, 100, 200])
parser.add_argument("--draws", type=int, default=8)
parser.add_argument("--steps", type=int, help="in an epoch, about, for all networks")
args = parser.parse_args()
if max(args.adapters) > N_ADAPTERS - N_TESTED:
    parser.error(f"argument --adapters: {N_TESTED} of {N_ADAPTERS} adapters are kept for the test")
if args.steps:
    for name in ("GLNetClassifier", "GLNetRegressor", "MLPNetClassifier", "MLPNetRegressor"):
        getattr(sklora.estimators, name)._least_steps = args.steps

zoos = {
    "varied": make_varied_digits_loras(N_ADAPTERS, random_state=1),
    "code": make_code_loras(N_ADAPTERS, random_state=1),
}
for zoo_name, zoo in zoos.items():
    for target, task in TARGETS[zoo_name].items():
        for n_adapters in args.adapters:
            scores = {}
            for seed in range(args.draws):
                for name, models in candidates(task, seed).items():
                    row = [score(model, zoo, target, n_adapters, seed) for model in models]
                    scores.setdefault(name, []).append(row)
            for name, rows in scores.items():
                line = "".join(f"{mean:8.3f}" for mean in np.mean(rows, axis=0))
                if len(rows[0]) == 2:
                    gains = np.diff(rows)
                    error = gains.std(ddof=1) / len(gains) ** 0.5
                    line += f"{gains.mean():+8.3f} ± {error:.3f}"
                print(f"{zoo_name:8}{target:12}{n_adapters:4}  {name:9}{line}", flush=True)
