"""
Search over architectures on a dask cluster
===========================================

``GridSearchCV`` puts its work on a cluster when joblib is told to: under
``joblib.parallel_config("dask")``, every candidate on every fold is a task for some worker. Here
two worker processes stand for the cluster. For a cluster of many machines, start ``dask scheduler``
and ``dask worker`` there, connect with ``Client("tcp://scheduler:8786")``, and put the zoo's file
where all of them see it; the rest stays as it is.

Needs the extra ``dask``: ``pip install ".[dask]"`` in a clone of the repository.
"""

# %%
# The zoo in one file
# -------------------
# A task that gets a collection in memory gets all of its weights. A collection that is mapped from
# a file travels as a path and row numbers, and the worker reads its rows itself.

import pickle
import tempfile
from pathlib import Path

import joblib
import matplotlib.pyplot as plt
import numpy as np
from distributed import Client, get_task_stream
from distributed.deploy.subprocess import SubprocessCluster
from sklearn.model_selection import GridSearchCV, KFold

from sklora import ARCHITECTURES, LoRACollection, architecture_grid, make_architecture
from sklora.datasets import load_digits_loras

temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
zoo = load_digits_loras()
zoo.data.save(folder / "zoo.safetensors")
X = LoRACollection.open(folder / "zoo.safetensors")

folds = KFold(3, shuffle=True, random_state=0)
training, _ = next(folds.split(X))
part = X[training]
print(f"{len(part)} adapters: {part.nbytes:,} bytes of weights")
print(f"{len(pickle.dumps(part)):,} bytes as a pickle, row numbers and ids included")

# %%
# What is searched
# ----------------
# To be quick, this page searches only the three of the five architectures that train in a second or
# two. :func:`~sklora.architecture_grid` has an entry for each.

grid = dict(zip(ARCHITECTURES, architecture_grid("regression", random_state=0), strict=False))
names = ["mlp", "o-align", "svd"]
model = make_architecture("svd", "regression")
search = GridSearchCV(model, [grid[name] for name in names], cv=folds)

# %%
# The search, on two workers
# --------------------------
# Each worker has one thread, because networks are trained one after another in threads of one
# process; dask sets ``OMP_NUM_THREADS=1`` in it. The workers of a ``LocalCluster`` would import
# this script again, which would then have to hide all it does behind ``if __name__ == "__main__"``.
# Those of a ``SubprocessCluster`` are started as ``dask worker`` starts them, and do not. (Windows
# has no ``SubprocessCluster``: use the guard and a ``LocalCluster`` there.)
#
# The target is the denoising loss on held-out images.

cluster = SubprocessCluster(
    n_workers=2,
    threads_per_worker=1,
    dashboard_address=":0",
    scheduler_kwargs={"scheduler_file": str(folder / "scheduler.json")},
    worker_kwargs={"local_directory": str(folder)},
)
with cluster, Client(cluster) as client:
    client.wait_for_workers(2)
    with get_task_stream(client) as stream, joblib.parallel_config("dask"):
        search.fit(X, zoo.loss)

# %%
# Scores and spread over the folds. A constant prediction has an R2 of 0 at best.

results = search.cv_results_
scores = np.array([results[f"split{fold}_test_score"] for fold in range(folds.n_splits)]).T
for name, of_folds, seconds in zip(names, scores, results["mean_fit_time"], strict=True):
    print(f"{name:8} R2 {of_folds.mean():6.3f} ± {of_folds.std(ddof=1):.3f}{seconds:7.1f} s")

# %%
# Who did what
# ------------
# Left, each dot is a fold. Right, each box is a task: a candidate on a fold, or inside it a block
# of adapters for a featurizer, which puts its own work on the cluster too. The first task of each
# worker includes its imports, torch among them. The last fit, of the best candidate on all
# adapters, is not a task: it runs in this program.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for row, of_folds in enumerate(scores):
    left.barh(row, of_folds.mean(), color="0.85", edgecolor="0.4")
    left.plot(of_folds, np.full(len(of_folds), row), "o", color="#0072B2", markersize=5)
left.axvline(0, color="0.3", linewidth=1)
left.set(yticks=range(len(names)), yticklabels=names, xlabel="R2 of the denoising loss")
left.invert_yaxis()

spans = [
    (task["worker"], part["start"], part["stop"])
    for task in stream.data for part in task["startstops"] if part["action"] == "compute"
]  # fmt: skip
begin = min(start for _, start, _ in spans)
workers = sorted({worker for worker, _, _ in spans})
for lane, worker in enumerate(workers):
    boxes = [(start - begin, stop - start) for of, start, stop in spans if of == worker]
    right.broken_barh(boxes, (lane - 0.3, 0.6), facecolor="#56B4E9", edgecolor="0.2", alpha=0.5)
right.set(
    yticks=range(len(workers)), yticklabels=[f"worker {lane + 1}" for lane in range(len(workers))],
    xlabel="seconds since the first task",
)  # fmt: skip
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

temporary.cleanup()
