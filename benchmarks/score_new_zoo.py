"""Score the five architectures, at their defaults, on a zoo that is trained for it.

A fifth of the adapters is held out. Training 2,046 adapters takes some 20 minutes on two cores, and
fitting all architectures about as long.

    python benchmarks/score_new_zoo.py
"""

import argparse
import time

import numpy as np
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split

from sklora import ARCHITECTURES, make_architecture
from sklora.datasets import make_digits_loras

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--adapters", type=int, default=2046)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

start = time.perf_counter()
zoo = make_digits_loras(args.adapters, random_state=args.seed)
print(f"{zoo.data}, trained in {time.perf_counter() - start:.0f} s")
train, test = train_test_split(np.arange(len(zoo.data)), test_size=0.2, random_state=0)
print(f"{'':10}" + "".join(f"{name:>9}" for name in ARCHITECTURES))
for target in ("presence", "size", "loss"):
    scores = []
    for name in ARCHITECTURES:
        task = "regression" if target == "loss" else "classification"
        model = make_architecture(name, task, random_state=0).fit(
            zoo.data[train], zoo[target][train]
        )
        predicted, true = model.predict(zoo.data[test]), zoo[target][test]
        scores.append(r2_score(true, predicted) if target == "loss" else (predicted == true).mean())
    print(f"{target:10}" + "".join(f"{score:9.3f}" for score in scores))
