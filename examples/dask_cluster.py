"""
Featurize and search on a dask cluster
======================================

Two worker processes stand for a cluster. Workers open the zoo's file themselves: a task brings them
its path and row numbers, not the weights. For a cluster of many machines, put the file where all of
them see it, and connect with ``Client("tcp://scheduler:8786")`` instead of starting a
``LocalCluster``.

Needs ``pip install sklora[dask]``.
"""

import pickle
import tempfile
from pathlib import Path

import joblib
from distributed import Client, LocalCluster
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline

from sklora import LoRACollection, MLPNetRegressor, SVDSpectrum
from sklora.datasets import load_digits_loras


def main(folder):
    # The bundled LoRAs in one file, which is mapped and not read.
    zoo = load_digits_loras()
    path = Path(folder) / "zoo.safetensors"
    zoo.data.save(path)
    X = LoRACollection.open(path)

    # What a task gets that trains on a fold.
    folds = KFold(3, shuffle=True, random_state=0)
    training, _ = next(folds.split(X))
    part = X[training]
    print(f"{len(part)} adapters: {part.nbytes:,} bytes of weights")
    print(f"{len(pickle.dumps(part)):,} bytes as a pickle, row numbers and ids included")

    # One thread to a worker: dask sets OMP_NUM_THREADS=1 in it.
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        Client(cluster),
        joblib.parallel_config("dask"),
    ):
        # Tasks are blocks of adapters.
        print(f"spectra: {SVDSpectrum().fit_transform(X).shape}")

        # Tasks are candidates on folds.
        model = make_pipeline(SVDSpectrum(), MLPNetRegressor(max_epochs=10, random_state=0))
        grid = {"mlpnetregressor__lr": [1e-3, 1e-2]}
        search = GridSearchCV(model, grid, cv=folds).fit(X, zoo.loss)

    print("denoising loss on held-out images, R2:")
    scores = search.cv_results_["mean_test_score"]
    for candidate, score in zip(search.cv_results_["params"], scores, strict=True):
        print(f"{candidate}: {score:.3f}")


# Worker processes import this file, and are not to run it again.
if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
