"""Score early stopping by rows, as networks do it, beside early stopping by whole groups.

On the zoo of digits where every set of digits comes twice: of the rows that are held out to stop
by, most have a twin among the training rows. Test adapters are of sets that training did not see.
Each line is a mean over folds and seeds: both scores, the gain by groups with its standard error
over the folds of all seeds, which is a little too small, the best epochs, the losses on the rows
held out then, and the share of these rows with a twin. Some 10 minutes a seed on a core of its own,
once the zoo exists. With --copies twins are near copies: the bundled zoo, with a copy of each
adapter at rank 3 in another gauge.

    python benchmarks/score_group_holdout.py
    python benchmarks/score_group_holdout.py --copies --architectures gl-net --seeds 1
"""

import argparse

import numpy as np
import torch
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold

import sklora.estimators._base as base
from sklora import LoRACollection, make_architecture
from sklora.datasets import fetch_digits_loras, load_digits_loras
from sklora.linalg import balance
from sklora.testing import apply_gauge

by_rows = base.split_validation


def with_copies(zoo, rank=3):
    """Give a zoo with the best approximation of lower rank to every adapter, in another gauge."""
    layout = zoo.data.layout.with_ranks([rank] * zoo.data.layout.n_modules)
    factors = [
        tuple(factor[..., :rank].numpy() for factor in balance(*map(torch.from_numpy, pair)))
        for pair in zoo.data.factors()
    ]
    copies = LoRACollection.from_array(layout.pack(factors), layout)
    zoo.data = LoRACollection.from_factors([*zoo.data, *apply_gauge(copies, random_state=0)])
    for name in ("presence", "loss", "size", "groups"):
        zoo[name] = np.concatenate([zoo[name], zoo[name]])
    return zoo


def by_groups(groups, keys, fraction, random_state):
    """Hold out whole groups, evenly over their mean targets."""
    _, places = np.unique(groups, return_inverse=True)
    means = np.array([keys[places == place].mean(axis=0) for place in range(places.max() + 1)])
    _, chosen = by_rows(means, fraction, random_state, classes=False)
    held_out = np.isin(places, chosen)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def fit(model, zoo, target, train, whole):
    """Train a model; give it with the share of held-out rows that have a twin in training."""
    groups, twins = zoo.groups[train], []

    def split(keys, fraction, random_state, *, classes):
        parts = (
            by_groups(groups, keys, fraction, random_state)
            if whole
            else by_rows(keys, fraction, random_state, classes=classes)
        )
        twins.append(np.isin(*(groups[part] for part in reversed(parts))).mean())
        return parts

    base.split_validation = split
    return model.fit(zoo.data[train], zoo[target][train]), twins[0]


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--architectures", nargs="+", default=["gl-net", "mlp"])
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--copies", action="store_true", help="near copies in place of twins")
parser.add_argument("--data-home", help="where the zoo is kept; see sklora.datasets")
args = parser.parse_args()

zoo = (
    with_copies(load_digits_loras())
    if args.copies
    else fetch_digits_loras(data_home=args.data_home)
)
for name in args.architectures:
    for target, task in {"presence": "classification", "loss": "regression"}.items():
        scores, epochs, losses, twins = [], [], [], []
        for seed in range(args.seeds):
            folds = GroupKFold(5, shuffle=True, random_state=seed)
            for train, test in folds.split(zoo.size, groups=zoo.groups):
                row = []
                for whole in (False, True):
                    model = make_architecture(name, task, random_state=seed)
                    model, share = fit(model, zoo, target, train, whole)
                    predicted, true = model.predict(zoo.data[test]), zoo[target][test]
                    right = (predicted == true).mean() if target == "presence" else None
                    score = r2_score(true, predicted) if right is None else right
                    curve = [epoch["valid_loss"] for epoch in model[-1].history_]
                    row.append((score, 1 + np.argmin(curve), min(curve), share))
                kept = (scores, epochs, losses, twins)
                for every, pair in zip(kept, zip(*row, strict=True), strict=True):
                    every.append(pair)
        gains = np.diff(scores)
        error = gains.std(ddof=1) / len(gains) ** 0.5
        rows, whole = np.mean(scores, axis=0)
        (before, after), (loss, fair) = np.mean(epochs, axis=0), np.mean(losses, axis=0)
        print(
            f"{name:8}{target:10}{rows:7.3f}{whole:7.3f}{gains.mean():+8.4f} ± {error:.4f}"
            f"   epochs {before:.1f} and {after:.1f}, losses {loss:.3f} and {fair:.3f}, "
            f"twins {np.mean(twins, axis=0)[0]:.0%}",
            flush=True,
        )
