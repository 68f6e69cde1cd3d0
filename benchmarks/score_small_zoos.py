"""Score networks on few adapters, with early stopping and with all of them trained on.

On two zoos that are trained for it, 500 adapters of a diffusion transformer with many recipes and
500 of a language model. Each line is a mean over eight draws of training adapters, scored on 250
others: the score with early stopping, without, and the gain with its standard error. Some 40
minutes on two cores, half of it for the zoos.

    python benchmarks/score_small_zoos.py
"""

import argparse

import numpy as np
from sklearn.metrics import r2_score

from sklora import make_architecture
from sklora.datasets import make_code_loras, make_varied_digits_loras

TARGETS = {
    "varied": {"attributes": "classification", "score": "regression"},
    "code": {"sources": "classification", "loss": "regression"},
}


def score_both(zoo, target, task, architecture, n_adapters, n_draws):
    """Give the score with early stopping, without it, and the standard error of the difference."""
    y, scores = zoo[target], []
    score = r2_score if task == "regression" else lambda true, guess: (true == guess).mean()
    for seed in range(n_draws):
        rows = np.random.RandomState(seed).permutation(len(y))
        train, test = rows[:n_adapters], rows[-250:]
        model = make_architecture(architecture, task, random_state=seed)
        scores.append([])
        for early_stopping in (True, False):
            model.set_params(model__early_stopping=early_stopping).fit(zoo.data[train], y[train])
            scores[-1].append(score(y[test], model.predict(zoo.data[test])))
    return *np.mean(scores, axis=0), np.std(np.diff(scores), ddof=1) / n_draws**0.5


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--adapters", type=int, nargs="+", default=[30, 60, 100, 200])
parser.add_argument("--draws", type=int, default=8)
args = parser.parse_args()

zoos = {
    "varied": make_varied_digits_loras(500, random_state=1),
    "code": make_code_loras(500, random_state=1),
}
for name, zoo in zoos.items():
    for target, task in TARGETS[name].items():
        for architecture in ("svd", "o-align", "gl-net"):
            for n_adapters in args.adapters:
                stopped, whole, error = score_both(
                    zoo, target, task, architecture, n_adapters, args.draws
                )
                print(
                    f"{name:8}{target:12}{architecture:9}{n_adapters:4}{stopped:8.3f}{whole:8.3f}"
                    f"{whole - stopped:+8.3f} ± {error:.3f}",
                    flush=True,
                )
